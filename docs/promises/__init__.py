"""What fastgrpo promises when things go wrong, and the tests that measure it; see docs/generate_reliability.py."""

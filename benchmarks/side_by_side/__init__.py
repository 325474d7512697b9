"""What the installed systems do with bad input: `python -m benchmarks.side_by_side` writes docs/side_by_side.md."""

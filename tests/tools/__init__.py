"""Campaigns longer than a test run: `python -m tests.tools.fuzz`, `python -m tests.tools.mutants`."""

"""Tests; a package so that `python -m tests.tools.fuzz` and the tests share their helpers."""

"""Tests of the public ops on whatever kernel the dispatcher serves."""

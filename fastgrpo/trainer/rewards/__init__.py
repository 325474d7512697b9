"""Scores of completions, and the processes that keep users' reward functions from doing harm."""

"""Accuracy on held-out questions, with or without tools."""

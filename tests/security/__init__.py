"""The package against hostile text, checkpoints, models and data, and what it may touch of the machine."""

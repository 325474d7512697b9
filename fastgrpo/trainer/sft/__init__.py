"""Supervised fine-tuning: of the base of the no-download jobs, and of a user's model."""

"""Checkpoints that survive a crash at any moment: written aside, hashed, renamed into place; read only if whole."""

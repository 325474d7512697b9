"""`fastgrpo plan`: peak memory of a language-model head's loss and gradients, before anything is run."""

from fastgrpo.planner.main import main

__all__ = ["main"]

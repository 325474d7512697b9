"""`fastgrpo verify`: the fused head against float64 on the user's own model."""

from fastgrpo.verify.main import main

__all__ = ["main"]

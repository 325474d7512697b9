"""The operators `torch.ops.fastgrpo.*`. Importing this package defines every op and registers its kernels."""

from fastgrpo.ops import scale_gradient

__all__ = ["scale_gradient"]

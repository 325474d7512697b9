"""Where the gradient of the weight is summed: one tensor, or slabs of rows that can be converted one by one."""

import torch
from torch import Tensor

MAX_SLABS = 8
SLAB_BYTES = 64 << 20  # at least, so that the C library returns a freed one to the system


def slab_count(total_bytes: int) -> int:
    """Slabs that a sum of this size comes in."""
    return min(max(total_bytes // SLAB_BYTES, 1), MAX_SLABS)


class WeightSum:
    """Sum of gradients of a weight [V, H]; nothing is initialised before the first product."""

    def __init__(self, slabs: list[Tensor], first: bool) -> None:
        """Keep the slabs, adjacent rows of the weight; `first`: they hold nothing yet."""
        self.slabs, self.first = slabs, first

    @classmethod
    def like(cls, weight: Tensor, dtype: torch.dtype, final: torch.dtype) -> "WeightSum":
        """Memory for a sum in `dtype`.

        Where it will be converted to the final dtype on a CPU, it comes in slabs that can be freed while the result
        grows: the peak is the sum alone, not the sum and the result.
        """
        rows = weight.shape[0]
        converted = dtype != final and weight.device.type == "cpu"
        count = slab_count(weight.numel() * dtype.itemsize) if converted else 1
        size = -(-rows // count)
        sizes = [min(size, rows - start) for start in range(0, rows, size)]
        return cls([weight.new_empty((n, weight.shape[1]), dtype=dtype) for n in sizes], first=True)

    def bounds(self) -> list[tuple[int, int]]:
        """Rows [start, stop) of each slab."""
        found, start = [], 0
        for slab in self.slabs:
            found.append((start, start + slab.shape[0]))
            start += slab.shape[0]
        return found

    def widen(self, dtype: torch.dtype) -> None:
        """Make room for more products than were announced."""
        self.slabs = [slab.to(dtype) for slab in self.slabs]

    def finish(self, dtype: torch.dtype) -> Tensor:
        """The sum in `dtype`, 0 if there never was a product; the slabs are given up."""
        if self.first:
            for slab in self.slabs:
                slab.zero_()
        if len(self.slabs) == 1:
            return self.slabs.pop().to(dtype)
        rows = sum(slab.shape[0] for slab in self.slabs)
        result = self.slabs[0].new_empty((rows, self.slabs[0].shape[1]), dtype=dtype)
        for (start, stop), slab in zip(self.bounds(), self.slabs, strict=True):
            result[start:stop].copy_(slab)
            slab.untyped_storage().resize_(0)
        self.slabs.clear()
        return result

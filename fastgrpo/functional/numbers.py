"""Run-time numbers as small device tensors: a value never becomes part of a compiled kernel."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


@lru_cache(maxsize=1024)
def _cached(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)


def number_tensor(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `values` as a 1-D tensor on `device`, without a host sync after the first use of a value.

    A copy to a GPU from pageable memory waits for the stream, so the result is cached there. While a graph is traced,
    or under a dispatch mode (fake tensors), the tensor is made anew.
    """
    if torch.compiler.is_compiling():
        # Only arithmetic with a tensor keeps a Python float symbolic through Inductor; torch.tensor([x]) specialises.
        one = torch.ones((), dtype=dtype, device=device)
        return torch.stack([one * value for value in values]) if values else one.new_empty(0)
    if device.type == "cpu" or _get_current_dispatch_mode() is not None:
        return torch.tensor(list(values), dtype=dtype, device=device)
    return _cached(tuple(values), dtype, device)

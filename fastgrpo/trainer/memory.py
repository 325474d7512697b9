"""What the memory of a run went to, in bytes."""

import resource
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

from fastgrpo.trainer.state import State

RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def memory_of(state: State) -> dict[str, int]:
    """Bytes of weights, gradients and moments on this process's device, and the most that was in use at any time."""
    policy = list(state.run.policy.parameters())
    moments = (v for slots in state.optimizer.state.values() for v in slots.values())
    parts = {
        "weights": _bytes(policy),
        "gradients": _bytes(p.grad for p in state.named_parameters().values()),
        "moments of the optimizer": _bytes(v for v in moments if isinstance(v, Tensor)),
    }
    for name, module in state.others().items():
        parts[name] = _bytes(module.parameters())
    if state.run.device.type == "cuda":
        parts["peak on the GPU"] = torch.cuda.max_memory_allocated(state.run.device)
    parts["peak of the process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
    return parts


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    """Of those that are there; of sharded ones this process's share."""
    there = (t for t in tensors if t is not None)
    local = (t.to_local() if hasattr(t, "to_local") else t for t in there)
    return sum(t.numel() * t.element_size() for t in local)

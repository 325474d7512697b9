"""Where the GPU tests run, and inputs that are copies there: a leaf must never share memory with the float64 gold."""

import os

import pytest
import torch
from torch import Tensor

# FASTGRPO_REHEARSE=1 runs the same tests at small sizes on CPU tensors through Triton's interpreter.
REHEARSAL = os.environ.get("FASTGRPO_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
HAS_GPU = torch.cuda.is_available()

needs_device = pytest.mark.skipif(
    not (REHEARSAL or HAS_GPU), reason="no CUDA device (FASTGRPO_REHEARSE=1 rehearses without)"
)
real_gpu = pytest.mark.skipif(
    REHEARSAL or not HAS_GPU, reason="needs a real GPU: the interpreter cannot show it"
)


def leaf(x: Tensor) -> Tensor:
    """A copy of `x` on the device under test that requires grad."""
    return x.detach().to(DEVICE, copy=True).requires_grad_()


def on_device(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the inputs on the device under test."""
    return {name: x.to(DEVICE, copy=True) for name, x in inputs.items()}


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same stored inputs in float64 on the CPU, where the reference serves."""
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}

"""`fastgrpo::scale_gradient_`: multiplies a stored gradient by the upstream gradient, read on the device."""

from torch import Tensor

from fastgrpo.ops.define import mutating_op


@mutating_op("fastgrpo::scale_gradient_", mutated="grad")
def scale_gradient_(
    grad: Tensor,  # any shape, contiguous, any float dtype
    scale: Tensor,  # [1] float32, or float64 with a float64 grad
) -> None:
    """`grad *= scale[0]`, in place. Compiled kernels write nothing if the factor is exactly 1."""
    grad.mul_(scale)


@scale_gradient_.register_fake
def _(grad: Tensor, scale: Tensor) -> None:
    return None

"""`fastgrpo_linear::head_*`: the matrix products of a language-model head in bfloat16 with float32 sums.

The kernels of this file are the specification; compiled ones for CPUs with AVX512-BF16 take precedence. They stand in a
namespace of their own because a GPU has no use for them: its BLAS has these products.
"""

import torch
from torch import Tensor

from fastgrpo import host
from fastgrpo.ops.define import mutating_op


def is_native(device: torch.device) -> bool:
    """Whether compiled products serve this device, and are its fastest bfloat16 products (AMX units are faster)."""
    if device.type != "cpu" or host.cpu_capability() != "avx512_bf16":
        return False
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    name = "fastgrpo_linear::head_logits"
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU") and not has_amx()


def rounded(dlogits: Tensor, split: bool) -> Tensor:
    """What the gradient products multiply: `dlogits` as one bfloat16 number each, or as two that add up to it."""
    high = dlogits.bfloat16().float()
    return high + (dlogits - high).bfloat16().float() if split else high


@mutating_op("fastgrpo_linear::head_logits", mutated="logits")
def head_logits(
    hidden: Tensor,  # [n, H] bfloat16
    weight: Tensor,  # [V, H] bfloat16
    logits: Tensor,  # [n, V] float32, any row stride
) -> None:
    """`logits` = hidden @ weight.T."""
    torch.mm(hidden.float(), weight.float().t(), out=logits)


@mutating_op("fastgrpo_linear::head_hidden_gradient", mutated="dhidden")
def head_hidden_gradient(
    dlogits: Tensor,  # [n, V] bfloat16 or float32
    weight: Tensor,  # [V, H] bfloat16
    residual: Tensor,  # [n] float32 or [0]: what rounding takes from the column of each row's token
    token_ids: Tensor,  # [n] int64
    split: bool,  # two bfloat16 numbers stand for a float32 one
    dhidden: Tensor,  # [n, H] bfloat16 or float32
) -> None:
    """`dhidden` = dlogits @ weight + residual * weight[token_ids], rounded once."""
    total = rounded(dlogits.float(), split) @ weight.float()
    if residual.numel():
        total += residual[:, None] * weight[token_ids.clamp(0, weight.shape[0] - 1)].float()
    dhidden.copy_(total)


@mutating_op("fastgrpo_linear::head_weight_gradient", mutated="dweight")
def head_weight_gradient(
    dlogits: Tensor,  # [n, V] bfloat16 or float32
    hidden: Tensor,  # [n, H] bfloat16
    residual: Tensor,  # [n] float32 or [0]
    token_ids: Tensor,  # [n] int64
    split: bool,
    accumulate: bool,  # needs a float32 dweight
    dweight: Tensor,  # [V, H] bfloat16 or float32
) -> None:
    """`dweight` (+)= dlogits.T @ hidden, plus residual * hidden in the rows of the tokens, rounded once."""
    total = rounded(dlogits.float(), split).t() @ hidden.float()
    if residual.numel():
        column = token_ids.clamp(0, dweight.shape[0] - 1)
        total.index_put_((column,), residual[:, None] * hidden.float(), accumulate=True)
    dweight.copy_(dweight + total if accumulate else total)


@mutating_op("fastgrpo_linear::narrow_rows", mutated="narrow")
def narrow_rows(
    wide: Tensor,  # [n, V] float32
    index: Tensor,  # [k] int64, ascending
    narrow: Tensor,  # [k, V] bfloat16; may lie in the memory of `wide` at or before the rows that are read
) -> None:
    """`narrow` = wide[index], rounded."""
    narrow.copy_(wide.index_select(0, index))


@head_logits.register_fake
def _(hidden: Tensor, weight: Tensor, logits: Tensor) -> None:
    return None


@head_hidden_gradient.register_fake
def _(
    dlogits: Tensor, weight: Tensor, residual: Tensor, token_ids: Tensor, split: bool, dhidden: Tensor
) -> None:  # fmt: skip
    return None


@head_weight_gradient.register_fake
def _(
    dlogits: Tensor, hidden: Tensor, residual: Tensor, token_ids: Tensor, split: bool, accumulate: bool,
    dweight: Tensor,
) -> None:  # fmt: skip
    return None


@narrow_rows.register_fake
def _(wide: Tensor, index: Tensor, narrow: Tensor) -> None:
    return None

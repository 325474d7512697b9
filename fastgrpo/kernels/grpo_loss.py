"""`grpo_loss`: logits to loss and dlogits in one kernel, one program per row on grid axis 0.

A live row is read twice, the second time backwards and, with few rows in flight, out of the L2 cache; its gradient is
written once: 2 units of logits traffic where two kernels need 3. The coefficient between the passes comes from the
device code of `policy_loss`. Rows without a gradient are filled with zeros and not read again. An objective that pools
over sequences needs every row's log-prob before any coefficient: it runs as forward, policy loss and backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgrpo.kernels import token_logprob
from fastgrpo.kernels.codes import GATES_CAPACITY, KL_TARGET, KL_TARGET_REF, METRIC_ROWS
from fastgrpo.kernels.gates import gates_closed
from fastgrpo.kernels.launch import on_device_of, row_config, row_shape, same_shift
from fastgrpo.kernels.policy_loss import is_pooled, policy_loss
from fastgrpo.kernels.policy_metrics import finish, finite, metric_rows, nothing, sequence_totals
from fastgrpo.kernels.policy_terms import (
    clamp_log_ratio,
    gradient_by_logprob,
    pooled_log_ratio,
    token_terms,
)
from fastgrpo.kernels.row import row_pointer, row_statistics
from fastgrpo.kernels.row_gradient import row_gradient, zero_row
from fastgrpo.kernels.surrogates import lookup
from fastgrpo.kernels.token_logprob import gradient_coefficients, load_units


@triton.jit
def _optional(ptr, row, default, PRESENT: tl.constexpr):
    value = default
    if PRESENT:
        value = tl.load(ptr + row)
    return value


@triton.jit
def _token(
    row, logprob, entropy, advantage_ptr, weight_ptr, old_ptr, ref_ptr, rollout_ptr, log_weight_ptr, token_weight_ptr,
    kl_weight_ptr, bonus, params_ptr, token_loss_ptr, dlogprob_ptr, rows_ptr, contribution_ptr,
    SPEC: tl.constexpr, CUSTOM: tl.constexpr, PRESENT: tl.constexpr,
):  # fmt: skip
    """Write the token's loss, metrics and share of the total loss; return d loss / d logprob."""
    advantage = tl.load(advantage_ptr + row)
    weight = tl.load(weight_ptr + row)
    one = advantage * 0.0 + 1.0
    old = _optional(old_ptr, row, logprob, PRESENT[0])
    target = old
    if SPEC[KL_TARGET] == KL_TARGET_REF:
        target = _optional(ref_ptr, row, logprob, PRESENT[1])
    rollout = _optional(rollout_ptr, row, logprob, PRESENT[2])
    rollout = tl.where(rollout == rollout, rollout, logprob)
    token_weight = _optional(token_weight_ptr, row, one, PRESENT[4])
    kl_weight = _optional(kl_weight_ptr, row, one, PRESENT[5])
    raw = logprob - old
    d, stopped, clamped = clamp_log_ratio(raw, advantage, params_ptr)
    if PRESENT[3]:
        d += tl.load(log_weight_ptr + row)
    log_ratio, share = pooled_log_ratio(d, stopped, d, one, params_ptr, SPEC)
    gates = tl.zeros([GATES_CAPACITY], logprob.dtype)
    live = row >= 0
    closed, closed_kl = gates_closed(
        logprob, old, rollout, entropy, advantage, live, gates, params_ptr, SPEC
    )
    token_loss, policy, kl, ratio, gain, through_ratio, direct, clamped_kl = token_terms(
        logprob, advantage, target, token_weight, kl_weight, log_ratio, closed, closed_kl, params_ptr,
        SPEC, CUSTOM, PRESENT[1] if SPEC[KL_TARGET] == KL_TARGET_REF else PRESENT[0],
    )  # fmt: skip
    through = tl.where(weight == 0, 0.0, weight * through_ratio)
    dlogprob = gradient_by_logprob(weight, through, direct, share, SPEC, False)
    loss = tl.where(weight == 0, 0.0, weight * token_loss).to(tl.float64)
    loss -= tl.where(bonus == 0, 0.0, bonus * entropy).to(tl.float64)
    good = finite(logprob) & finite(old) & finite(target) & finite(token_loss)
    active = (dlogprob != 0) | (bonus != 0)
    index = tl.arange(0, METRIC_ROWS)
    metrics = metric_rows(
        index, policy, kl, ratio, gain, raw, closed, clamped, clamped_kl, entropy, logprob, good == 0, active,
        advantage, params_ptr,
    )  # fmt: skip
    tl.store(rows_ptr + row * METRIC_ROWS + index, metrics)
    tl.store(contribution_ptr + row, loss)
    tl.store(token_loss_ptr + row, token_loss)
    tl.store(dlogprob_ptr + row, dlogprob)
    return dlogprob


@triton.jit
def _row_kernel(
    logits_ptr, token_ids_ptr, temperature_ptr, logit_params_ptr, mask_ptr, advantage_ptr, weight_ptr,
    old_ptr, ref_ptr, rollout_ptr, log_weight_ptr, token_weight_ptr, kl_weight_ptr, entropy_weight_ptr, params_ptr,
    grad_scale_ptr, token_loss_ptr, logprob_ptr, entropy_ptr, dlogprob_ptr, rows_ptr, contribution_ptr, dlogits_ptr,
    stride_n, stride_out_n, temperature_stride, n_cols,
    SPEC: tl.constexpr, CUSTOM: tl.constexpr, PRESENT: tl.constexpr, NUM_LOGIT_PARAMS: tl.constexpr,
    ENTROPY: tl.constexpr, GRADIENT: tl.constexpr, HAS_GRAD_SCALE: tl.constexpr,
    ROWS: tl.constexpr, VEC: tl.constexpr, LOADS: tl.constexpr, ALIGNED: tl.constexpr, SAME_SHIFT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    out_ptr = row_pointer(dlogits_ptr, row, stride_out_n, ALIGNED and SAME_SHIFT, VEC)
    if not tl.load(mask_ptr + row):
        tl.store(token_loss_ptr + row, 0.0)
        tl.store(logprob_ptr + row, 0.0)
        tl.store(dlogprob_ptr + row, 0.0)
        if ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        if GRADIENT:
            zero_row(out_ptr, n_cols, ALIGNED, SAME_SHIFT, ROWS, VEC)
        return
    token_id = tl.load(token_ids_ptr + row)
    target = tl.minimum(tl.maximum(token_id, 0), n_cols - 1).to(tl.int32)
    c, slope, slope_low, inner, softcap, dx_dz = load_units(
        row, temperature_ptr, temperature_stride, logit_params_ptr, NUM_LOGIT_PARAMS
    )
    row_ptr = row_pointer(logits_ptr, row, stride_n, ALIGNED, VEC)
    logprob, entropy, lse = row_statistics(
        row_ptr, target, n_cols, c, slope, slope_low, inner, softcap,
        ALIGNED, NUM_LOGIT_PARAMS >= 2, ENTROPY, ROWS, VEC, LOADS, "evict_last" if GRADIENT else "",
    )  # fmt: skip
    bad_id = token_id != target
    logprob = tl.where(bad_id, float("nan"), logprob)
    entropy = tl.where(bad_id, float("nan"), entropy) if ENTROPY else logprob * 0.0
    tl.store(logprob_ptr + row, logprob)
    if ENTROPY:
        tl.store(entropy_ptr + row, entropy)
    bonus = _optional(entropy_weight_ptr, row, c * 0.0, PRESENT[6])
    dlogprob = _token(
        row, logprob, entropy, advantage_ptr, weight_ptr, old_ptr, ref_ptr, rollout_ptr, log_weight_ptr,
        token_weight_ptr, kl_weight_ptr, bonus, params_ptr, token_loss_ptr, dlogprob_ptr, rows_ptr, contribution_ptr,
        SPEC, CUSTOM, PRESENT,
    )  # fmt: skip
    if GRADIENT:
        grad_scale = _optional(grad_scale_ptr, 0, c * 0.0 + 1.0, HAS_GRAD_SCALE)
        dlogprob = tl.where(logprob == -float("inf"), 0.0, dlogprob * grad_scale)
        dentropy = -bonus * grad_scale
        if (dlogprob == 0) & (dentropy == 0):
            zero_row(out_ptr, n_cols, ALIGNED, SAME_SHIFT, ROWS, VEC)
        else:
            a, b, d_target = gradient_coefficients(logprob, entropy, dlogprob, dentropy, dx_dz)
            row_gradient(
                row_ptr, out_ptr, target, n_cols, c, inner, softcap, logprob, lse, a, b, d_target,
                ALIGNED, SAME_SHIFT, NUM_LOGIT_PARAMS >= 2, PRESENT[6], ROWS, VEC, LOADS, "evict_first",
            )  # fmt: skip


def grpo_loss(
    logits: Tensor,  # [N, V]
    token_ids: Tensor,  # [N]
    temperature: Tensor,  # [1] or [N]
    logit_params: Tensor,  # [0], [1] or [2]
    advantage: Tensor,  # [N]
    mask: Tensor,  # [N] bool
    weight: Tensor,  # [N]
    old: Tensor,  # [N] or [0], like all that follow up to entropy_weight
    ref: Tensor,
    rollout: Tensor,
    log_weight: Tensor,
    token_weight: Tensor,
    kl_weight: Tensor,
    entropy_weight: Tensor,
    cu_seqlens: Tensor,  # [B + 1] int32
    params: Tensor,  # [NUM_PARAMS]
    grad_scale: Tensor,  # [1] or [0]
    spec: list[int],
    surrogate: str,
    with_entropy: bool,
    dlogits: Tensor,  # [N, V], may be the memory of logits, or [0]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch `fastgrpo::grpo_loss`: loss, token_loss, logprob, entropy, dlogprob, metrics."""
    optional = (old, ref, rollout, log_weight, token_weight, kl_weight, entropy_weight)
    if is_pooled(spec):
        return _in_three_steps(
            logits, token_ids, temperature, logit_params, advantage, mask, weight, optional, cu_seqlens, params,
            grad_scale, spec, surrogate, with_entropy, dlogits,
        )  # fmt: skip
    n, n_cols = logits.shape
    token_loss, logprob, dlogprob = (torch.empty_like(weight) for _ in range(3))
    entropy = torch.empty_like(weight) if with_entropy else weight.new_empty(0)
    if n == 0 or cu_seqlens.numel() == 1:
        loss, metrics = nothing(weight.dtype, weight.device)
        return loss, token_loss, logprob, entropy, dlogprob, metrics
    rows = torch.empty(n, METRIC_ROWS.value, dtype=weight.dtype, device=weight.device)
    contribution = torch.empty(n, dtype=torch.float64, device=weight.device)
    gradient = dlogits.numel() > 0
    out = dlogits if gradient else logits
    softcap = logit_params.numel() == 2
    config = row_config(logits, softcap, one_pass=gradient)
    with on_device_of(logits):
        _row_kernel[(n,)](
            logits, token_ids, temperature, logit_params, mask, advantage, weight, *optional, params, grad_scale,
            token_loss, logprob, entropy, dlogprob, rows, contribution, out,
            logits.stride(0), out.stride(0), int(temperature.numel() > 1), n_cols,
            SPEC=tuple(spec), CUSTOM=lookup(surrogate), PRESENT=tuple(x.numel() > 0 for x in optional),
            NUM_LOGIT_PARAMS=logit_params.numel(), ENTROPY=with_entropy, GRADIENT=gradient,
            HAS_GRAD_SCALE=grad_scale.numel() > 0, **row_shape(logits, config)._asdict(),
            SAME_SHIFT=same_shift(logits, out), **config.options(),
        )  # fmt: skip
    loss, metrics = finish(*sequence_totals(rows, contribution, mask, cu_seqlens), weight.dtype)
    return loss, token_loss, logprob, entropy, dlogprob, metrics


def _in_three_steps(
    logits: Tensor, token_ids: Tensor, temperature: Tensor, logit_params: Tensor, advantage: Tensor, mask: Tensor,
    weight: Tensor, optional: tuple[Tensor, ...], cu_seqlens: Tensor, params: Tensor, grad_scale: Tensor,
    spec: list[int], surrogate: str, with_entropy: bool, dlogits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Forward, policy loss, backward: 3 units of logits traffic."""
    *sides, entropy_weight = optional
    logprob, entropy, lse = token_logprob.forward(
        logits, token_ids, mask, temperature, logit_params, with_entropy
    )
    loss, token_loss, dlogprob, metrics = policy_loss(
        logprob, advantage, mask, weight, *sides, entropy, entropy_weight, cu_seqlens, params, spec, surrogate
    )  # fmt: skip
    if dlogits.numel():
        scale = grad_scale if grad_scale.numel() else 1.0
        dentropy = entropy_weight
        if entropy_weight.numel():
            dentropy = torch.where(mask, -entropy_weight * scale, 0.0)
        token_logprob.backward(
            logits, token_ids, temperature, logit_params, logprob, entropy, lse, dlogprob * scale, dentropy, dlogits
        )  # fmt: skip
    return loss, token_loss, logprob, entropy, dlogprob, metrics

"""Log-probability and entropy of sampled tokens from logits: eager forward and hand-written backward.

Notation per row: z logits, u = z, or softcap * tanh(scale * z / softcap); x = u * c with c = scale / T (1 / T under a
softcap); p = softmax(x). Working with (u - max u) * c instead of x keeps z = 1e37 at T = 0.01 finite.
"""

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of statistics and per-token results: float64 for float64 input, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _units(
    logits: Tensor, temperature: Tensor, logit_params: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return u [N, V], c [N or 1, 1] and du/dz * c [N or 1, V or 1]."""
    u = logits.to(accumulate_dtype(logits.dtype))
    inverse_temperature = (1.0 / temperature).unsqueeze(-1)
    if logit_params.numel() < 2:
        c = inverse_temperature * logit_params if logit_params.numel() else inverse_temperature
        return u, c, c
    scale, softcap = logit_params[0], logit_params[1]
    tanh = torch.tanh(scale * u / softcap)
    return softcap * tanh, inverse_temperature, inverse_temperature * scale * (1 - tanh * tanh)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) to full precision (torch's own switches to x at 20)."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def token_logprob_fwd(
    logits: Tensor,  # [N, V]
    token_ids: Tensor,  # [N] int64
    mask: Tensor,  # [N] bool, or [0]: all rows are live
    temperature: Tensor,  # [1] or [N]
    logit_params: Tensor,  # [0], [1] = (scale) or [2] = (scale, softcap)
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # logprob [N], entropy [N] or [0], lse [N] in logit units
    """Score the tokens; the target is left out of the normaliser so that confident tokens keep their digits.

    logprob = -softplus(log sum_{j != t} exp(x_j - m) - (x_t - m)); a row with NaN, +inf, no finite logit or a token id
    outside [0, V) gives NaN in that row alone; masked rows give exactly 0.
    """
    vocabulary = logits.shape[1]
    live = mask if mask.numel() else torch.ones_like(token_ids, dtype=torch.bool)
    valid = (token_ids >= 0) & (token_ids < vocabulary)
    target = token_ids.clamp(0, vocabulary - 1).unsqueeze(1)
    u, c, _ = _units(logits, temperature, logit_params)
    u_max = u.amax(dim=1, keepdim=True)
    y = (u - u_max) * c
    exp_y = torch.exp(y)
    rest = exp_y.scatter(1, target, 0.0).sum(dim=1)
    total = exp_y.sum(dim=1)
    logprob = 0.0 - _softplus(torch.log(rest) - y.gather(1, target).squeeze(1))

    def settle(value: Tensor) -> Tensor:
        value = torch.where(valid & ~total.isnan(), value, torch.nan)
        return torch.where(live, value, 0.0)

    lse = settle(u_max.squeeze(1) + torch.log(total) / c.squeeze(1))
    if not with_entropy:
        return settle(logprob), logprob.new_empty(0), lse
    weighted = torch.where(exp_y > 0, exp_y * y, 0.0).sum(dim=1)
    return settle(logprob), settle(torch.log(total) - weighted / total), lse


def _log_softmax(u: Tensor, c: Tensor, u_target: Tensor, logprob: Tensor, lse: Tensor) -> Tensor:
    """Log p [N, V] relative to the target or to lse, whichever rounds less: at u = 1e37 lse has lost log(sum)."""
    by_target = logprob.abs() < (lse * c).abs()
    origin = torch.where(by_target, u_target, lse)
    return (u - origin) * c + torch.where(by_target, logprob, 0.0)


def token_logprob_bwd(
    logits: Tensor,  # [N, V]
    token_ids: Tensor,  # [N]
    temperature: Tensor,  # [1] or [N]
    logit_params: Tensor,  # [0], [1] or [2]
    logprob: Tensor,  # [N]
    entropy: Tensor,  # [N] or [0]
    lse: Tensor,  # [N]
    dlogprob: Tensor,  # [N] or [0]
    dentropy: Tensor,  # [N] or [0]
) -> Tensor:  # dlogits [N, V], dtype of logits
    """Gradient with respect to the logits.

    dx_j = dlogprob * (1[j = t] - p_j) - dentropy * p_j * (log p_j + entropy), with 1 - p_t = -expm1(logprob). Rows
    whose two upstream gradients are exactly 0 are 0; a target of probability 0 passes no gradient through its log-prob.
    """
    zeros = torch.zeros_like(logprob)
    dlogprob = torch.where(logprob == -torch.inf, 0.0, dlogprob) if dlogprob.numel() else zeros
    dentropy = dentropy if dentropy.numel() else zeros
    entropy = entropy if entropy.numel() else zeros
    target = token_ids.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    u, c, dx_dz = _units(logits, temperature, logit_params)
    log_p = _log_softmax(u, c, u.gather(1, target), logprob.unsqueeze(1), lse.unsqueeze(1))
    p = torch.exp(log_p)
    pushed_down = -dlogprob.unsqueeze(1) * p
    pushed_down.scatter_(1, target, (-dlogprob * torch.expm1(logprob)).unsqueeze(1))
    flattened = dentropy.unsqueeze(1) * torch.where(p == 0, 0.0, p * (log_p + entropy.unsqueeze(1)))
    dlogits = torch.where(p == 0, pushed_down, (pushed_down - flattened)) * dx_dz
    dlogits = torch.where((p == 0) & (pushed_down == 0), 0.0, dlogits)
    idle = ((dlogprob == 0) & (dentropy == 0)).unsqueeze(1)
    faulty = (logprob.isnan() | dlogprob.isnan() | dentropy.isnan()).unsqueeze(1)
    return torch.where(idle, 0.0, torch.where(faulty, torch.nan, dlogits)).to(logits.dtype)

"""Published losses written as plainly as their papers print them, differentiated by autograd.

Nothing here uses fastgrpo: these are the independent formulas that `test_losses.py` compares with. All tensors are
[B, T] float64; masked slots hold finite numbers. A token loss is returned per token and reduced by `reduce_tokens`.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LIMIT = 20.0  # every preset clamps log-ratios and the KL exponent


@dataclass(frozen=True)
class Batch:
    """l, l_old, l_ref, l_rollout of the sampled tokens, advantages and the mask."""

    logprob: Tensor
    old: Tensor
    ref: Tensor
    rollout: Tensor
    advantage: Tensor
    mask: Tensor

    def with_logprob(self, logprob: Tensor) -> "Batch":
        return replace(self, logprob=logprob)


def make_batch(
    batch: int = 6, length: int = 7, *, seed: int = 0, per_token: bool = False, noise: float = 0.4
) -> Batch:
    """Ragged completions with a fully masked row, a tool-call hole, a zero advantage and log-ratios beyond +-20."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    logprob = -normal(batch, length).abs() - 0.05
    old, ref, rollout = (
        (logprob + noise * normal(batch, length)).clamp(max=-1e-3) for _ in range(3)
    )
    lengths = torch.randint(1, length + 1, (batch,), generator=g)
    lengths[0], lengths[-1] = length, 0
    mask = torch.arange(length)[None, :] < lengths[:, None]
    mask[0, length // 2] = False  # the model did not write this token
    old[0, 0], old[1, 0] = logprob[0, 0] - 26.0, logprob[1, 0] - 0.5
    logprob[2, 0] = old[2, 0] - 31.0  # far below: the clamp acts on the other side
    ref[0, 1], ref[2, 0] = logprob[0, 1] - 24.0, logprob[2, 0] + 23.0
    advantage = (
        normal(batch, length) if per_token else normal(batch)[:, None].expand(-1, length).clone()
    )
    advantage[1] = 0.0
    advantage[0], advantage[2] = advantage[0].abs(), -advantage[2].abs()
    return Batch(logprob, old, ref, rollout, advantage, mask)


def total(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0.0).sum(1, keepdim=True)


def mean(x: Tensor, mask: Tensor) -> Tensor:
    return total(x, mask) / mask.sum(1, keepdim=True).clamp(min=1)


def log_ratio(b: Batch, limit: float | None = LIMIT) -> Tensor:
    d = b.logprob - b.old
    return d if limit is None else d.clamp(-limit, limit)


def by_sign(b: Batch, positive: float, negative: float) -> Tensor:
    """One number where A > 0, another elsewhere (a Python scalar would be rounded to float32 first)."""
    pair = torch.tensor([positive, negative], dtype=torch.float64)
    return torch.where(b.advantage > 0, pair[0], pair[1])


# Token losses of the presets -----------------------------------------------------------------------------------------


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """PPO, Schulman et al. 2017, Eq. 7."""
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def ppo(b: Batch, low: float = 0.2, high: float = 0.2, limit: float | None = LIMIT) -> Tensor:
    return clipped(log_ratio(b, limit).exp(), b.advantage, low, high)


def two_sided(b: Batch, delta: float, low: float = 0.2, high: float = 0.2) -> Tensor:
    """INTELLECT-2 (arXiv 2505.07291), Eq. 5: the unclipped branch is capped at delta."""
    r = log_ratio(b).exp()
    return -torch.minimum(
        r.clamp(max=delta) * b.advantage, r.clamp(1 - low, 1 + high) * b.advantage
    )


def dual_clip(b: Batch, c: float, eps: float = 0.2) -> Tensor:
    """Ye et al. 2019 (arXiv 1912.09729), Eq. 7: for A < 0 the objective is max(min(...), c A)."""
    inner = -ppo(b, eps, eps)
    return -torch.where(b.advantage < 0, torch.maximum(inner, c * b.advantage), inner)


def gspo(b: Batch, low: float = 3e-4, high: float = 4e-4) -> Tensor:
    s = mean(log_ratio(b), b.mask).exp().expand_as(b.logprob)
    return clipped(s, b.advantage, low, high)


def gspo_token(b: Batch, low: float = 3e-4, high: float = 4e-4) -> Tensor:
    """s_it = sg(s_i) * pi / sg(pi). A clamped log-ratio is a constant, so it carries no gradient of its own."""
    own = log_ratio(b)
    s = (mean(own, b.mask).detach() + own - own.detach()).exp()
    return clipped(s, b.advantage, low, high)


def gmpo(b: Batch, low: float = 0.4, high: float = 0.4) -> Tensor:
    """GMPO, Eq. 5: each token's log-ratio is clipped on the side that its advantage pushes to."""
    d, sign = log_ratio(b), b.advantage.sign()
    pessimistic = sign * torch.minimum(sign * d, sign * d.clamp(-low, high))
    pooled = torch.where(b.advantage == 0, d, pessimistic)
    return -b.advantage * mean(pooled, b.mask).exp()


def cispo(b: Batch, low: float = 0.0, high: float = 5.0) -> Tensor:
    return -log_ratio(b).exp().clamp(low, high).detach() * b.advantage * b.logprob


def sapo(b: Batch, positive: float = 1.0, negative: float = 1.05) -> Tensor:
    tau = by_sign(b, positive, negative)
    return -4 / tau * torch.sigmoid(tau * (log_ratio(b).exp() - 1)) * b.advantage


def vespo(b: Batch, log_weight: Tensor | None = None) -> Tensor:
    """phi(W) = W^k exp(lambda (1 - W)), detached; W is the sequence ratio times the rollout correction."""
    log_w = total(log_ratio(b), b.mask)
    if log_weight is not None:
        log_w = log_w + total(log_weight.clamp(math.log(1e-8), 20.0), b.mask)
    log_w = log_w.clamp(math.log(1e-8), 20.0)
    k, lam = by_sign(b, 2.0, 3.0), by_sign(b, 3.0, 2.0)
    phi = (lam + k * log_w - lam * log_w.exp()).exp().detach()
    return -phi * b.advantage * b.logprob


def rloo(b: Batch, eps: float = 0.2) -> Tensor:
    return clipped(total(log_ratio(b), b.mask).exp().expand_as(b.logprob), b.advantage, eps, eps)


def reinforce(b: Batch) -> Tensor:
    return -b.advantage * b.logprob


def topr(b: Batch) -> Tensor:
    tapered = log_ratio(b).exp().clamp(0, 1).detach()
    return torch.where(b.advantage > 0, 1.0, tapered) * -b.advantage * b.logprob


def dppo_tv(b: Batch, low: float = 0.2, high: float = 0.2, cap: float = 20.0) -> Tensor:
    moved = b.logprob.exp() - b.old.exp()
    keep = torch.where(b.advantage > 0, moved <= high, moved >= -low)
    weight = log_ratio(b).exp().clamp(max=cap).detach()
    return -b.advantage * weight * b.logprob * keep.detach()


def dppo_kl(b: Batch, low: float = 0.2, high: float = 0.2, cap: float = 20.0) -> Tensor:
    p, q = b.logprob.exp(), b.old.exp()
    divergence = q * log_ratio(b).neg() + (1 - q) * torch.log((1 - q) / (1 - p))
    keep = torch.where(
        b.advantage > 0, (divergence <= high) | (p <= q), (divergence <= low) | (p >= q)
    )
    weight = log_ratio(b).exp().clamp(max=cap).detach()
    return -b.advantage * weight * b.logprob * keep.detach()


def dro(b: Batch, beta: float) -> Tensor:
    return -(b.advantage * b.logprob - beta / 2 * (b.logprob - b.old) ** 2)


# KL, reduction and gradient ------------------------------------------------------------------------------------------


def kl(
    b: Batch, estimator: str, gradient: str, ratio: Tensor, *, target: Tensor | None = None,
    clamp_in: float | None = LIMIT, clamp_out: float | None = None, cap: float = 10.0,
) -> Tensor:  # fmt: skip
    """Schulman's estimators (joschu.net/blog/kl-approx) with the four gradients in use."""
    delta = (b.ref if target is None else target) - b.logprob
    if clamp_in is not None:
        delta = delta.clamp(-clamp_in, clamp_in)
    value = {
        "k1": -delta,
        "k2": delta**2 / 2,
        "k3": torch.expm1(delta) - delta,
        "abs": delta.abs(),
    }[estimator]
    if clamp_out is not None:
        value = value.clamp(-clamp_out, clamp_out)
    if gradient == "k2":
        k2 = delta**2 / 2
        return value.detach() + k2 - k2.detach()
    if gradient == "ratio":
        return ratio * value
    if gradient == "ratio_detached":
        return ratio.detach().clamp(max=cap) * value
    return value


def reduce_tokens(
    token_loss: Tensor, mask: Tensor, per: str, *, power: float = -1.0, length: int | None = None,
    groups: Tensor | None = None, count_empty: bool = True, normalizer: float | None = None,
) -> Tensor:  # fmt: skip
    """One plain formula per published reduction; see the table of `fastgrpo.choices.Reduce`."""
    tokens = mask.sum(1)
    sums = total(token_loss, mask)[:, 0]
    sequences = mask.shape[0] if count_empty else int((tokens > 0).sum())
    if per == "token":
        return sums.sum() / (normalizer or max(int(mask.sum()), 1))
    if per == "sequence":
        return (sums * tokens.clamp(min=1).double() ** power).sum() / (
            normalizer or max(sequences, 1)
        )
    if per == "constant":
        return sums.sum() / length / (normalizer or max(sequences, 1))
    assert groups is not None
    per_prompt = []
    for group in groups.unique():
        rows = groups == group
        if count_empty or bool((tokens[rows] > 0).any()):
            per_prompt.append(sums[rows].sum() / max(int(tokens[rows].sum()), 1))
    return torch.stack(per_prompt).sum() / (normalizer or len(per_prompt))

"""Errors of the fused head and of eager code in the same dtype, both against float64 on the same stored numbers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgrpo.functional.linear_token_logprob import linear_token_logprob
from fastgrpo.verify.head import ModelHead

CHUNK = 8192  # rows of the weight in float64 at a time
Scores = tuple[Tensor, Tensor]  # log-prob and entropy, [N]


@dataclass(frozen=True)
class Comparison:
    """Largest error of one quantity; for gradients relative to the largest entry."""

    quantity: str
    fused: float
    eager: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the fused result is within its bound (NaN is not)."""
        return self.fused <= self.bound


def scaled(logits: Tensor, head: ModelHead, temperature: float) -> Tensor:
    """From products to logits: scale, softcap, temperature."""
    x = logits * head.logit_scale
    if head.logit_softcap is not None:
        x = head.logit_softcap * torch.tanh(x / head.logit_softcap)
    return x / temperature


def scores_of(x: Tensor, token_ids: Tensor) -> Scores:
    """Log-prob and entropy by log-softmax."""
    log_p = x.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, token_ids[:, None])[:, 0], entropy


def exact(
    hidden: Tensor, head: ModelHead, ids: Tensor, temperature: float, upstream: Scores
) -> tuple[Tensor, ...]:
    """Log-prob, entropy, dHidden and dWeight in float64; the weight is widened a chunk of rows at a time."""
    wide, vocabulary = hidden.double(), head.weight.shape[0]
    logits = wide.new_empty(hidden.shape[0], vocabulary)
    for start in range(0, vocabulary, CHUNK):
        rows = slice(start, start + CHUNK)
        logits[:, rows] = wide @ head.weight[rows].double().t()
        if head.bias is not None:
            logits[:, rows] += head.bias[rows].double()
    logits.requires_grad_()
    logprob, entropy = scores_of(scaled(logits, head, temperature), ids)
    (dlogits,) = torch.autograd.grad((logprob * upstream[0] + entropy * upstream[1]).sum(), logits)
    dhidden, dweight = torch.zeros_like(wide), torch.empty(head.weight.shape, device=wide.device)
    for start in range(0, vocabulary, CHUNK):
        rows = slice(start, start + CHUNK)
        dhidden += dlogits[:, rows] @ head.weight[rows].double()
        dweight[rows] = (dlogits[:, rows].t() @ wide).float()
    return logprob.detach(), entropy.detach(), dhidden, dweight


def run(
    score: Callable[[Tensor, Tensor], Scores], hidden: Tensor, weight: Tensor, upstream: Scores
) -> tuple[Tensor, ...]:
    """Scores and gradients of an implementation in the stored dtype."""
    leaves = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())
    logprob, entropy = score(*leaves)
    total = (logprob * upstream[0]).sum() + (entropy * upstream[1]).sum()
    return logprob.detach(), entropy.detach(), *torch.autograd.grad(total, leaves)


def compare(
    head: ModelHead, tokens: int, temperature: float, device: torch.device, seed: int
) -> list[Comparison]:
    """Score random tokens at random hidden states of unit size, forward and backward, three ways.

    A quantity passes if the fused error is at most twice that of eager code in the same dtype, or a few float32
    roundings of the largest logit where eager code is exact.
    """
    g = torch.Generator().manual_seed(seed)
    vocabulary, size = head.weight.shape
    weight = head.weight.to(device)
    head = ModelHead(
        weight, None if head.bias is None else head.bias.to(device), head.logit_scale,
        head.logit_softcap, head.tied, head.source,
    )  # fmt: skip
    hidden = torch.randn(tokens, size, generator=g).to(device, weight.dtype)
    ids = torch.randint(vocabulary, (tokens,), generator=g).to(device)
    upstream = tuple((torch.randn(tokens, generator=g) / tokens).to(device) for _ in range(2))
    wanted = exact(hidden, head, ids, temperature, (upstream[0].double(), upstream[1].double()))

    def eager(h: Tensor, w: Tensor) -> Scores:
        logits = torch.nn.functional.linear(
            h, w, None if head.bias is None else head.bias.to(w.dtype)
        )
        return scores_of(scaled(logits.float(), head, temperature), ids)

    def fused(h: Tensor, w: Tensor) -> Scores:
        found = linear_token_logprob(
            h, w, ids, bias=head.bias, temperature=temperature, with_entropy=True,
            logit_scale=head.logit_scale, logit_softcap=head.logit_softcap,
        )  # fmt: skip
        assert found.entropy is not None
        return found.logprob, found.entropy

    ours, theirs = (
        run(score, hidden, weight, (upstream[0], upstream[1])) for score in (fused, eager)
    )
    largest = float(wanted[0].abs().max())
    rounding = torch.finfo(torch.float32).eps * max(largest, 1.0)
    floors = (4 * rounding, 16 * rounding, 16 * rounding, 16 * rounding)
    rows = []
    for name, gold, mine, plain, floor in zip(
        ("logprob", "entropy", "dHidden", "dWeight"), wanted, ours, theirs, floors, strict=True
    ):
        unit = float(gold.abs().max()) if name.startswith("d") else 1.0
        error, eager_error = (_largest(x, gold) / max(unit, 1e-30) for x in (mine, plain))
        rows.append(Comparison(name, error, eager_error, max(2 * eager_error, floor)))
    return rows


def _largest(actual: Tensor, gold: Tensor) -> float:
    """Largest absolute difference; NaN if any entry is NaN."""
    return float((actual.to(gold.dtype) - gold).abs().max())

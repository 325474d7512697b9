"""Rows of reliability's tables 2b and 2c: the loss on extreme, masked and mis-shaped arguments, and advantages."""

import torch
from torch import Tensor

from benchmarks.side_by_side.systems import System
from benchmarks.side_by_side.verdicts import (
    OK,
    WRONG,
    compare,
    gradient,
    loss_and_gradient,
    refusal,
)
from tests.tools.fence import fenced

INF, NAN = float("inf"), float("nan")
B, T, V = 3, 4, 12


def batch(extra: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits [B, T + extra, V], ids, advantage, mask and the policy's own log-probs."""
    g = torch.Generator().manual_seed(10)
    logits = torch.randn(B, T + extra, V, generator=g)
    ids = torch.randint(V, (B, T), generator=g)
    logprob = torch.log_softmax(logits[:, :T], -1).gather(-1, ids[..., None])[..., 0]
    return logits, ids, torch.tensor([1.0, -1.0, 0.5]), torch.ones(B, T, dtype=torch.bool), logprob


def plain_loss(
    logits: Tensor, ids: Tensor, advantage: Tensor, mask: Tensor, old: Tensor, limit: float = 20.0
) -> tuple[Tensor, Tensor]:
    """GRPO's loss and gradient in float64, log-ratios clamped to +-limit, masked slots left out."""
    leaf = logits.double().requires_grad_()
    logprob = torch.log_softmax(leaf, -1).gather(-1, ids[..., None])[..., 0]
    d = torch.where(mask, logprob - torch.where(mask, old.double(), logprob.detach()), 0.0).clamp(
        -limit, limit
    )
    ratio = d.exp()
    a = (advantage[:, None] if advantage.dim() == 1 else advantage).double()
    token = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    weight = mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    loss = (torch.where(mask, token, 0.0) * weight).sum()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def judged(
    system: System, logits: Tensor, *args: Tensor, want: tuple[Tensor, Tensor], **options: object
) -> str:
    leaf = logits.clone().requires_grad_()
    loss = system.loss(leaf, *args, **options)
    return loss_and_gradient(loss.detach(), gradient(loss, leaf), want, 1e-5)


def bounded(system: System, advantage: Tensor) -> str:
    """Log-ratio +100 in one token: finite everywhere, exactly nothing from rows of advantage 0."""
    logits, ids, _, mask, logprob = batch()
    old = logprob.clone()
    old[0, 1] -= 100.0
    leaf = logits.clone().requires_grad_()
    loss = system.loss(leaf, ids, advantage, mask, old)
    grad = gradient(loss, leaf)
    if grad is None or not bool(loss.isfinite() & grad.isfinite().all()):
        shown = (
            f"finite loss {float(loss):.2g}" if bool(loss.isfinite()) else f"loss {float(loss):.2g}"
        )
        return f"{shown}, NaN gradient" if grad is not None and bool(grad.isnan().any()) else shown
    idle = bool((grad[advantage == 0] == 0).all())
    return OK if idle else WRONG


def ratio_negative(system: System) -> str:
    return bounded(system, torch.tensor([-1.0, 1.0, 0.5]))


def ratio_idle(system: System) -> str:
    return bounded(system, torch.tensor([0.0, 1.0, 0.5]))


def far_reference(system: System) -> str:
    logits, ids, advantage, mask, logprob = batch()
    ref = logprob.clone()
    ref[0, 1] += 100.0
    leaf = logits.clone().requires_grad_()
    loss = system.loss(leaf, ids, advantage, mask, logprob, ref, beta=0.04)
    grad = gradient(loss, leaf)
    finite = bool(loss.isfinite()) and grad is not None and bool(grad.isfinite().all())
    return OK if finite else f"loss {float(loss):.2g}"


def masked_garbage(system: System) -> str:
    """NaN in every masked slot of old, ref and (where -inf and NaN do not pass a product) the logits."""
    logits, ids, advantage, mask, logprob = batch()
    mask[:, -1] = False
    old = logprob - 0.1
    want = plain_loss(logits, ids, advantage, mask, old)
    dead_logits = logits if system.one_row_only else logits.masked_fill(~mask[..., None], NAN)
    ref = logprob.masked_fill(~mask, NAN)
    return judged(
        system,
        dead_logits,
        ids,
        advantage,
        mask,
        old.masked_fill(~mask, NAN),
        ref,
        want=want,
        beta=0.0,
    )


def masked_old_infinite(system: System) -> str:
    logits, ids, advantage, mask, logprob = batch()
    mask[:, -1] = False
    old = logprob - 0.1
    want = plain_loss(logits, ids, advantage, mask, old)
    return judged(system, logits, ids, advantage, mask, old.masked_fill(~mask, -INF), want=want)


def all_masked(system: System) -> str:
    logits, ids, advantage, mask, logprob = batch()
    zero = (torch.zeros(()), torch.zeros_like(logits))
    return judged(system, logits, ids, advantage, torch.zeros_like(mask), logprob, want=zero)


def one_masked(system: System) -> str:
    """A sequence without a token counts in the denominator, as TRL defines it."""
    logits, ids, advantage, mask, logprob = batch()
    mask[1] = False
    want = plain_loss(logits, ids, advantage, mask, logprob)
    return judged(system, logits, ids, advantage, mask, logprob, want=want)


def advantage_shape(system: System, shape: tuple[int, ...]) -> str:
    """Right (as one value per sequence or token), refused by name, or trained on something else."""
    logits, ids, advantage, mask, logprob = batch()
    given = (
        advantage[:, None].expand(B, T) * torch.tensor([1.0, 2.0, 0.5, 1.0])
        if shape == (B, T)
        else advantage[:, None]
    )
    want = plain_loss(logits, ids, given, mask, logprob - 0.05)
    args = (ids, fenced(given.contiguous(), at_end=True), mask, logprob - 0.05)
    verdict = refusal(lambda: system.loss(logits.clone(), *args), "advantage")
    return verdict if verdict != "accepted" else judged(system, logits, *args, want=want)


def advantage_column(system: System) -> str:
    return advantage_shape(system, (B, 1))


def advantage_token(system: System) -> str:
    return advantage_shape(system, (B, T))


def advantage_short(system: System) -> str:
    logits, ids, advantage, mask, logprob = batch()
    short = fenced(advantage[:-1].clone(), at_end=True)
    return refusal(lambda: system.loss(logits, ids, short, mask, logprob), "advantage")


def old_shape(system: System, value: Tensor) -> str:
    logits, ids, advantage, mask, _ = batch()
    return refusal(
        lambda: system.loss(logits, ids, advantage, mask, fenced(value, at_end=True)), "old"
    )


def old_column(system: System) -> str:
    return old_shape(system, torch.full((B, 1), -2.0))


def old_row(system: System) -> str:
    return old_shape(system, torch.full((T,), -2.0))


def option(system: System, names: tuple[str, ...], with_ref: bool = True, **options: object) -> str:
    logits, ids, advantage, mask, logprob = batch()
    ref = logprob - 0.1 if with_ref else None
    return refusal(
        lambda: system.loss(logits, ids, advantage, mask, logprob, ref, **options), *names
    )


def epsilon_negative(system: System) -> str:
    return option(system, ("epsilon", "eps_low"), eps_low=-0.5)


def epsilon_large(system: System) -> str:
    return option(system, ("epsilon", "eps_low"), eps_low=1.5)


def beta_negative(system: System) -> str:
    return option(system, ("beta",), beta=-1.0)


def reference_missing(system: System) -> str:
    return option(system, ("ref_logp", "ref_per_token", "reference"), with_ref=False, beta=0.04)


def delta_zero(system: System) -> str:
    return option(system, ("delta",), delta=0.0)


def in_place(system: System) -> tuple[Tensor, ...]:
    """Batch for the in-place rows; Liger's kernel wants one more position."""
    if system.title not in ("Liger Triton", "fastgrpo", "fastgrpo Triton"):
        raise NotImplementedError
    return batch(extra=1 if system.extra_position else 0)


def second_backward(system: System) -> str:
    """With the graph retained and another upstream gradient: right, or an error."""
    logits, ids, advantage, mask, logprob = in_place(system)
    want = plain_loss(logits[:, :T], ids, advantage, mask, logprob)[1]
    leaf = logits.clone().requires_grad_()
    loss = system.loss(leaf * 1.0, ids, advantage, mask, logprob, inplace=True)
    try:
        torch.autograd.grad(2 * loss, leaf, retain_graph=True)
        (again,) = torch.autograd.grad(loss, leaf)
    except RuntimeError as error:
        return f"ERR ({type(error).__name__})"
    return compare(again[:, :T], want, 1e-5)


def saved_output(system: System) -> str:
    """Logits that tanh made and keeps for its own backward."""
    logits, ids, advantage, mask, _ = in_place(system)
    wide = logits.double().requires_grad_()
    produced = torch.tanh(wide)
    old = torch.log_softmax(produced[:, :T].detach(), -1).gather(-1, ids[..., None])[..., 0]
    upstream = plain_loss(produced[:, :T].detach(), ids, advantage, mask, old)[1]
    want = upstream * (1 - produced[:, :T].detach() ** 2)
    leaf = logits.clone().requires_grad_()
    try:
        loss = system.loss(torch.tanh(leaf), ids, advantage, mask, old.float(), inplace=True)
        (grad,) = torch.autograd.grad(loss, leaf)
    except RuntimeError as error:
        return f"ERR ({type(error).__name__})"
    return compare(grad[:, :T], want, 1e-5)


def shared_logits(system: System) -> str:
    """A second term on the same logits."""
    logits, ids, advantage, mask, logprob = in_place(system)
    wide = logits.double().requires_grad_()
    (other,) = torch.autograd.grad(0.1 * torch.logsumexp(wide, -1).square().sum(), wide)
    want = other[:, :T] + plain_loss(logits[:, :T], ids, advantage, mask, logprob)[1]
    leaf = logits.clone().requires_grad_()
    middle = leaf * 1.0
    try:
        term = 0.1 * torch.logsumexp(middle, -1).square().sum()
        loss = system.loss(middle, ids, advantage, mask, logprob, inplace=True)
        (grad,) = torch.autograd.grad(loss + term, leaf)
    except RuntimeError as error:
        return f"ERR ({type(error).__name__})"
    return compare(grad[:, :T], want, 1e-5)


def advantages(
    system: System, reward: list[float], want: list[float], group_size: int | None = None
) -> str:
    actual = system.advantage(torch.tensor(reward), group_size or len(reward))
    return compare(actual, torch.tensor(want), 1e-6)


def equal_thirds(system: System) -> str:
    return advantages(system, [1 / 3] * 7, [0.0] * 7)


def equal_random(system: System) -> str:
    """3000 groups of equal random rewards: share of groups that get a non-zero advantage, and the largest."""
    g = torch.Generator().manual_seed(11)
    moved, worst = 0, 0.0
    for _ in range(3000):
        size = int(torch.randint(2, 65, (1,), generator=g))
        value = float(torch.rand(1, generator=g)) * 10 ** float(
            torch.randint(-2, 4, (1,), generator=g)
        )
        largest = float(system.advantage(torch.full((size,), value), size).abs().max())
        moved, worst = moved + (largest > 0), max(worst, largest)
    return (
        OK if moved == 0 else f"{WRONG} ({100 * moved / 3000:.0f} % of groups, up to {worst:.2g})"
    )


def nan_reward(system: System) -> str:
    """NaN = not scored: left out, the others relative to each other."""
    return advantages(
        system,
        [0.0, 1.0, NAN],
        [-(0.5**0.5) / (1 + 1e-4 * 2**0.5), 0.5**0.5 / (1 + 1e-4 * 2**0.5), 0.0],
    )


def infinite_reward(system: System) -> str:
    verdict = refusal(lambda: system.advantage(torch.tensor([0.0, 1.0, INF, 2.0]), 4), "reward")
    return verdict if verdict != "accepted" else "whole group silently 0"


def huge_reward(system: System) -> str:
    scale = 1e30 / (1e30 * 0.5**0.5 + 1e-4)
    return advantages(system, [0.0, 1e30], [-0.5 * scale, 0.5 * scale])


def single(system: System) -> str:
    return advantages(system, [0.7], [0.0])

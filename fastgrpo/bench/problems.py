"""The inputs that every provider gets, and the float64 answer that it is held against."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgrpo import Objective
from fastgrpo.testing import SHAPES

# Objective of every loss benchmark: GRPO with k3 KL, mean over tokens; each peer can be told the same.
BETA, EPSILON = 0.04, 0.2
GROUP = 8  # completions per prompt
OBJECTIVE = Objective.bnpo(epsilon=EPSILON, beta=BETA)
# With zero-advantage rows to skip, KL must be off: it would keep their gradient.
OBJECTIVE_NO_KL = Objective.bnpo(epsilon=EPSILON)


@dataclass(frozen=True)
class Case:
    """One row group of the table: what is computed, on which shape."""

    what: str  # logprob, loss, linear, advantage
    mode: str  # forward, or train: forward and gradient
    tokens: int
    vocabulary: int
    hidden: int
    dtype: torch.dtype
    active: float = 1.0  # share of the rows with a gradient
    skip_by: str = "mask"  # how the others are inactive: mask, or advantage (zero-advantage groups)
    frozen_head: bool = False
    length: int = 64  # tokens per completion

    @property
    def completions(self) -> int:
        """Number of completions."""
        return max(1, self.tokens // self.length)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        if self.what == "advantage":
            return f"advantage of {self.completions} completions in groups of {GROUP}"
        size = f"N={self.tokens} V={self.vocabulary}" + (
            f" H={self.hidden}" if self.what == "linear" else ""
        )
        share = "" if self.active == 1 else f" active {self.active:.0%} by {self.skip_by}"
        return f"{self.what} {self.mode} {dtype} {size}{share}{' frozen head' if self.frozen_head else ''}"


@dataclass
class Problem:
    """The tensors of a case: completions of equal length, padded layout, one advantage per completion."""

    case: Case
    token_ids: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool
    advantage: Tensor  # [B]
    old_logprob: Tensor  # [B, T]
    ref_logprob: Tensor  # [B, T]
    reward: Tensor  # [B]
    logits: Tensor | None = None  # [B, T, V]
    hidden: Tensor | None = None  # [B, T, H]
    weight: Tensor | None = None  # [V, H]
    expected: dict[str, Tensor] = field(default_factory=dict)

    @property
    def objective(self) -> Objective:
        """GRPO with KL, without it where zero-advantage rows shall cost nothing."""
        return OBJECTIVE_NO_KL if self.case.skip_by == "advantage" else OBJECTIVE


def preset(name: str) -> tuple[int, int]:
    """Hidden size and vocabulary of a named model."""
    for shape in SHAPES:
        if shape.name == name:
            return shape.hidden, shape.vocabulary
    raise ValueError(f"unknown preset {name!r}; known: {', '.join(shape.name for shape in SHAPES)}")


def make_problem(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Draw realistic inputs: peaked rows (normaliser 10 to 30), tokens sampled, an old policy that is a little off."""
    g = torch.Generator().manual_seed(seed)
    b, t, v, h = case.completions, case.length, case.vocabulary, case.hidden
    if case.what == "advantage":
        v = 1  # no vocabulary is involved
    hidden = weight = logits = None
    if case.what == "linear":
        rows = hidden = torch.randn(b, t, h, generator=g).to(case.dtype)
        weight = (torch.randn(v, h, generator=g) * (5.0 / h**0.5)).to(case.dtype)
    else:
        rows = logits = (torch.randn(b, t, v, generator=g) * 5.0).to(case.dtype)
    parts = [_rows(part, weight) for part in rows.flatten(0, 1).split(64)]
    token_ids = torch.cat([torch.multinomial(part.softmax(-1), 1, generator=g) for part in parts])
    logprob = torch.cat([part.log_softmax(-1) for part in parts]).gather(1, token_ids).view(b, t)
    advantage = torch.randn(b, generator=g)
    mask = torch.ones(b, t, dtype=torch.bool)
    if case.skip_by == "mask":
        mask = (torch.arange(t) < round(t * case.active)).expand(b, t).contiguous()
    else:
        advantage[torch.randperm(b, generator=g)[: b - round(b * case.active)]] = 0.0
    old, ref = (logprob + 0.1 * torch.randn(b, t, generator=g) for _ in range(2))
    reward = torch.randint(0, 2, (b,), generator=g).float()
    tensors = (token_ids.view(b, t), mask, advantage, old, ref, reward, logits, hidden, weight)
    problem = Problem(case, *(None if x is None else x.to(device) for x in tensors))  # type: ignore[arg-type]
    problem.expected = expected(problem)
    return problem


def _rows(part: Tensor, weight: Tensor | None) -> Tensor:
    return part.float() if weight is None else part.float() @ weight.float().T


def expected(problem: Problem) -> dict[str, Tensor]:
    """Log-prob, entropy, loss, gradients and advantages in float64 on the same stored inputs, by plain autograd."""
    if problem.case.what == "advantage":
        return {"advantage": _plain_advantage(problem.reward.double())}
    if problem.hidden is not None and problem.weight is not None:
        hidden = problem.hidden.double().requires_grad_()
        weight = problem.weight.double().requires_grad_(not problem.case.frozen_head)
        logits, leaves = hidden @ weight.T, {"dhidden": hidden, "dweight": weight}
    else:
        assert problem.logits is not None
        logits = problem.logits.double().requires_grad_()
        leaves = {"dlogits": logits}
    x = logits.log_softmax(-1)
    logprob = x.gather(-1, problem.token_ids[..., None])[..., 0]
    out = {"logprob": logprob.detach(), "entropy": -(x.exp() * x).sum(-1).detach()}
    if problem.case.what == "logprob":
        loss = weighted_sum(problem, logprob)
    else:
        loss = plain_loss(problem, logprob)
        out["loss"] = loss.detach()
    if problem.case.mode == "train":
        loss.backward()
    return out | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def _plain_advantage(reward: Tensor) -> Tensor:
    grouped = reward.view(-1, GROUP)
    centred = grouped - grouped.mean(1, keepdim=True)
    advantage = centred / (grouped.std(1, keepdim=True) + 1e-4)
    equal = grouped.amax(1, keepdim=True) == grouped.amin(1, keepdim=True)
    return torch.where(equal, 0.0, advantage).reshape(-1)


def weighted_sum(problem: Problem, logprob: Tensor) -> Tensor:
    """The scalar that log-prob benchmarks differentiate."""
    return torch.where(problem.mask, logprob * problem.advantage[:, None], 0.0).sum()


def plain_loss(problem: Problem, logprob: Tensor) -> Tensor:
    """The objective written out in PyTorch, in the dtype of `logprob`: what a user would write by hand."""
    dtype = logprob.dtype
    advantage = problem.advantage.to(dtype)[:, None]
    ratio = torch.exp(logprob - problem.old_logprob.to(dtype))
    token = -torch.min(ratio * advantage, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantage)
    if problem.objective.kl.beta:
        delta = problem.ref_logprob.to(dtype) - logprob
        token = token + BETA * (torch.exp(delta) - delta - 1)
    mask = problem.mask.to(dtype)
    return (token * mask).sum() / mask.sum()

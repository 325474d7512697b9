"""The inputs that every provider gets, and the float64 answer that it is held against."""

import re
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from fastgrpo import Objective
from fastgrpo.testing import SHAPES

# Objective of every loss benchmark: GRPO with k3 KL, mean over tokens; each peer can be told the same.
BETA, EPSILON = 0.04, 0.2
GROUP = 8  # completions per prompt
# The float64 answer is made in blocks of rows of about this many elements, and a gradient of the logits is judged on
# the first sequences of this many: 8 bytes per element of a large GPU problem would not fit beside it.
GOLD_BLOCK, GOLD_JUDGED = 2**25, 2**26
OBJECTIVE = Objective.bnpo(epsilon=EPSILON, beta=BETA)
# With zero-advantage rows to skip, KL must be off: it would keep their gradient.
OBJECTIVE_NO_KL = Objective.bnpo(epsilon=EPSILON)


@dataclass(frozen=True)
class Case:
    """One row group of the table: what is computed, on which shape."""

    what: str  # logprob, loss, linear, advantage
    mode: str  # forward, backward (of a forward that is not timed), or train: both
    tokens: int
    vocabulary: int
    hidden: int
    dtype: torch.dtype
    active: float = 1.0  # share of the rows with a gradient
    skip_by: str = "mask"  # how the others are inactive: mask, or advantage (zero-advantage groups)
    frozen_head: bool = False
    entropy: bool = True  # whether the entropy is asked for; who always or never gives it takes part all the same
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
        marks = " frozen head" if self.frozen_head else ""
        return f"{self.what} {self.mode} {dtype} {size}{share}{marks}{' with entropy' if self.entropy else ''}"


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

    def of_sequences(self, some: slice) -> "Problem":
        """The problem of some of the completions, without what is large."""
        names = ("token_ids", "mask", "advantage", "old_logprob", "ref_logprob", "reward")
        return replace(
            self,
            logits=None,
            hidden=None,
            expected={},
            **{n: getattr(self, n)[some] for n in names},
        )

    def share_of(self, whole: "Problem") -> Tensor | float:
        """What a mean over the tokens of this part counts in the mean over those of the whole."""
        if self.case.what == "logprob":
            return 1.0
        return self.mask.sum().double() / whole.mask.sum().double()

    @property
    def objective(self) -> Objective:
        """GRPO with KL, without it where zero-advantage rows shall cost nothing."""
        return OBJECTIVE_NO_KL if self.case.skip_by == "advantage" else OBJECTIVE


def preset(name: str) -> tuple[int, int]:
    """Hidden size and vocabulary of a named model, or of a size like 2048x151936."""
    if size := re.fullmatch(r"(\d+)x(\d+)", name):
        return int(size[1]), int(size[2])
    for shape in SHAPES:
        if shape.name == name:
            return shape.hidden, shape.vocabulary
    known = ", ".join(shape.name for shape in SHAPES)
    raise ValueError(f"--preset must be one of {known}, or HIDDENxVOCABULARY, got {name!r}")


def make_problem(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Draw realistic inputs: peaked rows (normaliser 10 to 30), tokens sampled, an old policy that is a little off.

    Cases that differ only in what is computed share their tensors and their float64 answer.
    """
    drawn = replace(case, mode="train", frozen_head=False, entropy=True)
    return replace(_draw(drawn, device, seed), case=case)


@lru_cache(maxsize=1)
def _draw(case: Case, device: torch.device, seed: int) -> Problem:
    g = torch.Generator(device).manual_seed(seed)
    b, t, v, h = case.completions, case.length, case.vocabulary, case.hidden
    if case.what == "advantage":
        v = 1  # no vocabulary is involved

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    hidden = weight = logits = None
    if case.what == "linear":
        rows = hidden = normal(b, t, h).to(case.dtype)
        weight = (normal(v, h) * (5.0 / h**0.5)).to(case.dtype)
    else:
        rows = logits = torch.cat([(normal(1, t, v) * 5.0).to(case.dtype) for _ in range(b)])
    sampled = []
    for part in rows.flatten(0, 1).split(64):
        x = (part.float() if weight is None else (part @ weight.T).float()).log_softmax(-1)
        ids = torch.multinomial(x.exp(), 1, generator=g)
        sampled.append((ids, x.gather(1, ids)))
    token_ids, logprob = (torch.cat(parts).view(b, t) for parts in zip(*sampled, strict=True))
    advantage = normal(b)
    mask = torch.ones(b, t, dtype=torch.bool, device=device)
    if case.skip_by == "mask":
        mask = (torch.arange(t, device=device) < round(t * case.active)).expand(b, t).contiguous()
    else:
        idle = torch.randperm(b, generator=g, device=device)[: b - round(b * case.active)]
        advantage[idle] = 0.0
    # A tenth of the tokens is clipped for certain, few others lie near a bound: rounding shall not decide.
    far = (torch.rand(b, t, generator=g, device=device) < 0.1) * 0.4 * normal(b, t).sign()
    old, ref = logprob + 0.05 * normal(b, t) + far, logprob + 0.1 * normal(b, t)
    reward = torch.randint(0, 2, (b,), generator=g, device=device).float()
    problem = Problem(case, token_ids, mask, advantage, old, ref, reward, logits, hidden, weight)
    problem.expected = expected(problem)
    return problem


def expected(problem: Problem) -> dict[str, Tensor]:
    """Log-prob, entropy, loss, gradients and advantages in float64 on the same stored inputs, by plain autograd.

    Made block by block of sequences: the loss is a sum over tokens, so blocks add up. The gradient of the logits may
    hold the first sequences only (GOLD_JUDGED).
    """
    if problem.case.what == "advantage":
        return {"advantage": _plain_advantage(problem.reward.double())}
    t, v = problem.case.length, problem.case.vocabulary
    block = max(1, GOLD_BLOCK // (t * v))
    parts: dict[str, list[Tensor]] = {"logprob": [], "entropy": [], "rows": []}
    weight = None if problem.weight is None else problem.weight.double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64, device=problem.mask.device)
    source = problem.logits if problem.hidden is None else problem.hidden
    assert source is not None
    for start in range(0, problem.case.completions, block):
        part = problem.of_sequences(slice(start, start + block))
        rows = source[start : start + block].double().requires_grad_()
        x = (rows if weight is None else rows @ weight.T).log_softmax(-1)
        logprob = x.gather(-1, part.token_ids[..., None])[..., 0]
        summed = weighted_sum if problem.case.what == "logprob" else plain_loss
        loss = summed(part, logprob) * part.share_of(problem)
        loss.backward()
        total += loss.detach()
        parts["logprob"].append(logprob.detach())
        parts["entropy"].append(-(x.exp() * x).sum(-1).detach())
        if weight is not None or start * t * v < GOLD_JUDGED:
            assert rows.grad is not None
            parts["rows"].append(rows.grad)
    out = {name: torch.cat(tensors) for name, tensors in parts.items()}
    gradient = out.pop("rows")
    if problem.case.what != "logprob":
        out["loss"] = total
    if weight is None:
        return out | {"dlogits": gradient}
    assert weight.grad is not None
    return out | {"dhidden": gradient, "dweight": weight.grad}


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

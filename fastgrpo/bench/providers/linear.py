"""From hidden states and the LM head to loss and gradients: eager, torch.compile, TRL, Liger, PyTorch's own, ours."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgrpo import linear_grpo_loss, plan_rows
from fastgrpo.bench.problems import EPSILON, Problem, plain_loss
from fastgrpo.bench.providers.base import (
    Contestant,
    NotApplicable,
    Outputs,
    Unavailable,
    provider,
)
from fastgrpo.functional.linear.gemm import Precision

TRL_VOCAB_CHUNK = 32_768  # TRL's default


def leaves(problem: Problem) -> tuple[Tensor, Tensor]:
    """Hidden states and head as leaves."""
    assert problem.hidden is not None
    assert problem.weight is not None
    train = problem.case.mode == "train"
    hidden = problem.hidden.detach().requires_grad_(train)
    return hidden, problem.weight.detach().requires_grad_(train and not problem.case.frozen_head)


def finish(hidden: Tensor, weight: Tensor, outputs: Outputs, loss: Tensor) -> Outputs:
    """Backward if a gradient is wanted, and collect the gradients."""
    if loss.requires_grad:
        loss.backward()
    grads = {"dhidden": hidden.grad, "dweight": weight.grad}
    return outputs | {name: grad for name, grad in grads.items() if grad is not None}


def loss_by(
    problem: Problem, score: Callable[[Tensor, Tensor], Tensor], whole: bool = False
) -> Contestant:
    """A contestant made of log-probs from hidden states and the loss written out."""

    def forward(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logprob = score(hidden, weight)
        return plain_loss(problem, logprob), logprob

    call = torch.compile(forward) if whole else forward

    def run() -> Outputs:
        hidden, weight = leaves(problem)
        loss, logprob = call(hidden, weight)
        return finish(hidden, weight, {"loss": loss, "logprob": logprob}, loss)

    return Contestant(run)


def plain_score(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """Log-probs the plain way: float32 softmax of the rounded logits."""
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]


def _eager(problem: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda hidden, weight: plain_score(hidden, weight, problem.token_ids)


def _packed(
    problem: Problem, score: Callable[[Tensor, Tensor, Tensor], Tensor] = plain_score
) -> Contestant:
    """The live rows copied together first, as a careful user would write it."""
    live = problem.mask
    if bool(live.all()):
        raise NotApplicable

    def packed(hidden: Tensor, weight: Tensor) -> Tensor:
        logprob = score(hidden[live], weight, problem.token_ids[live])
        return torch.zeros_like(problem.old_logprob).masked_scatter(live, logprob)

    return loss_by(problem, packed)


@provider("linear", "eager")
def eager(problem: Problem) -> Contestant:
    """Logits, float32 log-softmax, loss."""
    return loss_by(problem, _eager(problem))


@provider("linear", "torch.compile")
def compiled(problem: Problem) -> Contestant:
    """The same, compiled as one function."""
    return loss_by(problem, _eager(problem), whole=True)


@provider("linear", "eager, rows packed", skips="mask", note="live rows copied together by hand")
def eager_packed(problem: Problem) -> Contestant:
    """Eager on the live rows alone."""
    return _packed(problem)


@provider("linear", "torch.compile, rows packed", skips="mask", note="the same, log-probs compiled")
def compiled_packed(problem: Problem) -> Contestant:
    """The log-probs of the live rows compiled; the number of rows is static, its best case."""
    return _packed(problem, torch.compile(plain_score, dynamic=False))


@provider(
    "linear", "TRL", entropy=True, skips="mask", needs="trl", note="its fused head on the live rows"
)
def trl(problem: Problem) -> Contestant:
    """TRL's chunked head on the unmasked rows, and the loss written out."""
    from trl.trainer import utils

    def score(hidden: Tensor, weight: Tensor) -> Tensor:
        live = problem.mask
        logprob, *_ = utils._ChunkedLogProbFunction.apply(
            hidden[live],
            weight,
            None,
            problem.token_ids[live],
            1.0,
            TRL_VOCAB_CHUNK,
            None,
            1.0,
            ("entropy",) if problem.case.entropy else (),
        )
        return torch.zeros_like(problem.old_logprob).masked_scatter(live, logprob)

    return loss_by(problem, score)


@provider("linear", "Liger", needs="liger_kernel", note="gradient in forward")
def liger(problem: Problem) -> Contestant:
    """Liger's chunked loss."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    beta = problem.objective.kl.beta
    module = LigerFusedLinearGRPOLoss(
        beta=beta, compiled=False, use_ref_model=beta != 0, chunk_size=1,
        epsilon_low=EPSILON, epsilon_high=EPSILON, loss_type="bnpo",
    )  # fmt: skip

    def run() -> Outputs:
        hidden, weight = leaves(problem)
        loss, _ = module(
            hidden, weight, problem.token_ids, problem.mask.int(), problem.advantage,
            ref_per_token_logps=problem.ref_logprob if beta else None,
            old_per_token_logps=problem.old_logprob,
        )  # fmt: skip
        return finish(hidden, weight, {"loss": loss}, loss)

    return Contestant(run)


@provider(
    "linear",
    "F.linear_cross_entropy",
    skips="",
    note="cross-entropy per token, chunked from N >= H; loss written out",
)
def torch_chunked(problem: Problem) -> Contestant:
    """PyTorch's own chunked head, where this PyTorch has it."""
    function: Any = getattr(torch.nn.functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None:
        raise Unavailable(f"torch {torch.__version__} has no F.linear_cross_entropy")
    # Its documentation: chunking pays from as many rows as the hidden size; below, the plain path is faster.
    pays = problem.case.tokens >= problem.case.hidden
    extra: dict[str, Any] = {"options": options()} if options is not None and pays else {}

    def score(hidden: Tensor, weight: Tensor) -> Tensor:
        rows = hidden.flatten(0, 1)
        ids = problem.token_ids.flatten()
        return (
            -function(rows, weight, ids, reduction="none", **extra).view(problem.mask.shape).float()
        )

    return loss_by(problem, score)


def _ours(problem: Problem, precision: Precision, score_inactive: bool = True) -> Contestant:

    def run() -> Outputs:
        hidden, weight = leaves(problem)
        plan = None
        if not score_inactive:
            plan = plan_rows(
                problem.mask, problem.advantage, objective=problem.objective, score_inactive=False
            )
        out = linear_grpo_loss(
            hidden, weight, problem.token_ids, problem.advantage, problem.mask,
            old_logprob=problem.old_logprob, ref_logprob=problem.ref_logprob,
            objective=problem.objective, logits_precision=precision, with_entropy=problem.case.entropy,
            plan=plan,
        )  # fmt: skip
        assert out.logprob is not None
        outputs = {"loss": out.loss}
        if score_inactive:
            outputs["logprob"] = out.logprob
        return finish(hidden, weight, outputs, out.loss)

    return Contestant(run)


@provider("linear", "fastgrpo", ours=True, entropy=True, skips="mask, zero advantage, clipped")
def ours(problem: Problem) -> Contestant:
    """`linear_grpo_loss` with logits_precision="auto"."""
    return _ours(problem, "auto")


@provider(
    "linear",
    "fastgrpo, active rows only",
    ours=True,
    entropy=True,
    skips="mask, zero advantage, clipped",
    note="plan_rows(score_inactive=False): no log-probs and metrics of rows without a gradient",
)
def ours_active(problem: Problem) -> Contestant:
    """`linear_grpo_loss` that does not even score the rows of zero advantage."""
    if problem.case.skip_by != "advantage":
        raise NotApplicable
    return _ours(problem, "auto", score_inactive=False)


@provider(
    "linear", "fastgrpo float32", ours=True, entropy=True, skips="mask, zero advantage, clipped"
)
def ours_exact(problem: Problem) -> Contestant:
    """`linear_grpo_loss` with logits that are never rounded to the input dtype."""
    return _ours(problem, "float32")


@provider(
    "linear",
    "GEMM floor",
    floor=True,
    note="the bare GEMMs on all rows: 1 forward, 3 train, 2 with a frozen head",
)
def floor(problem: Problem) -> Contestant:
    """The matrix products that nobody can avoid when all rows are active."""
    assert problem.hidden is not None
    assert problem.weight is not None
    rows, weight = problem.hidden.flatten(0, 1), problem.weight
    logits = rows @ weight.T
    dhidden, dweight = torch.empty_like(rows), torch.empty_like(weight)

    def run() -> Outputs:
        torch.mm(rows, weight.T, out=logits)
        if problem.case.mode == "train":
            torch.mm(logits, weight, out=dhidden)
            if not problem.case.frozen_head:
                torch.mm(logits.T, rows, out=dweight)
        return {}

    return Contestant(run)

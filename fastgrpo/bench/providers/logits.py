"""From logits: eager PyTorch, torch.compile, TRL, Liger, ours, and the machine's own bandwidth."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastgrpo import grpo_loss, token_logprob
from fastgrpo.bench.problems import EPSILON, Problem, plain_loss, weighted_sum
from fastgrpo.bench.providers.base import Contestant, Outputs, Unavailable, provider

Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def leaf(problem: Problem) -> Tensor:
    """The logits as a leaf that requires grad where the mode asks for a gradient."""
    assert problem.logits is not None
    return problem.logits.detach().requires_grad_(problem.case.mode == "train")


def finish(problem: Problem, logits: Tensor, outputs: Outputs, loss: Tensor) -> Outputs:
    """Backward through `loss` if the mode asks for it, and collect the gradient."""
    if problem.case.mode == "train":
        loss.backward()
        assert logits.grad is not None
        outputs["dlogits"] = logits.grad
    return outputs


def eager_score(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy as a careful user writes them: a float32 log-softmax."""
    x = logits.float().log_softmax(-1)
    return x.gather(-1, token_ids[..., None])[..., 0], -(x.exp() * x).sum(-1)


def trl_score(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy by TRL's own function."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logprob, entropy = selective_log_softmax_and_entropy(logits, token_ids)
    return logprob, entropy


def logprob_by(problem: Problem, score: Score) -> Contestant:
    """A log-prob contestant."""

    def run() -> Outputs:
        logits = leaf(problem)
        logprob, entropy = score(logits, problem.token_ids)
        outputs = {"logprob": logprob, "entropy": entropy}
        return finish(problem, logits, outputs, weighted_sum(problem, logprob))

    return Contestant(run)


def loss_by(problem: Problem, score: Score, whole: bool = False) -> Contestant:
    """A loss contestant: a score function and the plain loss, compiled as a whole on request."""

    def forward(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logprob, entropy = score(logits, problem.token_ids)
        return plain_loss(problem, logprob), logprob, entropy

    call = torch.compile(forward) if whole else forward

    def run() -> Outputs:
        logits = leaf(problem)
        loss, logprob, entropy = call(logits)
        outputs = {"loss": loss, "logprob": logprob, "entropy": entropy}
        return finish(problem, logits, outputs, loss)

    return Contestant(run)


@provider("logprob", "eager", entropy=True)
def eager_logprob(problem: Problem) -> Contestant:
    """Float32 log-softmax."""
    return logprob_by(problem, eager_score)


@provider("logprob", "torch.compile", entropy=True)
def compiled_logprob(problem: Problem) -> Contestant:
    """The same, compiled."""
    return logprob_by(problem, torch.compile(eager_score))


@provider("logprob", "TRL", entropy=True, needs="trl")
def trl_logprob(problem: Problem) -> Contestant:
    """TRL's selective log-softmax with entropy (its Triton kernel on a GPU)."""
    return logprob_by(problem, trl_score)


@provider("loss", "eager", entropy=True)
def eager_loss(problem: Problem) -> Contestant:
    """Float32 log-softmax and the loss written out."""
    return loss_by(problem, eager_score)


@provider("loss", "torch.compile", entropy=True)
def compiled_loss(problem: Problem) -> Contestant:
    """The same, compiled as one function."""
    return loss_by(problem, eager_score, whole=True)


@provider("loss", "TRL", entropy=True, needs="trl", note="its log-probs, the loss written out")
def trl_loss(problem: Problem) -> Contestant:
    """TRL's log-probs and the loss written out."""
    return loss_by(problem, trl_score)


@provider("loss", "Liger", needs="liger_kernel", note="no entropy; gradient in place")
def liger_loss(problem: Problem) -> Contestant:
    """Liger's Triton loss, which drops the last position of each sequence by itself."""
    assert problem.logits is not None
    if problem.logits.device.type != "cuda":
        raise Unavailable("its Triton kernels need a GPU")
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    source = torch.cat([problem.logits, problem.logits[:, :1]], dim=1)
    scratch = torch.empty_like(source)
    beta = problem.objective.kl.beta

    def run() -> Outputs:
        logits = scratch.detach().requires_grad_(problem.case.mode == "train")
        loss, _ = triton_grpo_loss(
            logits, problem.old_logprob, problem.ref_logprob, problem.token_ids, problem.advantage,
            problem.mask.int(), temperature=1.0, beta=beta, eps_low=EPSILON, eps_high=EPSILON,
            inplace=True, loss_type="bnpo", reduce=True,
        )  # fmt: skip
        outputs = finish(problem, logits, {"loss": loss}, loss)
        return {name: x[:, :-1] if name == "dlogits" else x for name, x in outputs.items()}

    def restore() -> None:
        scratch.copy_(source)

    return Contestant(run, restore)


@provider("logprob", "fastgrpo", ours=True, entropy=True, skips="mask, zero upstream gradient")
def our_logprob(problem: Problem) -> Contestant:
    """`token_logprob`."""

    def run() -> Outputs:
        logits = leaf(problem)
        out = token_logprob(logits, problem.token_ids, mask=problem.mask, with_entropy=True)
        assert out.entropy is not None
        outputs = {"logprob": out.logprob, "entropy": out.entropy}
        return finish(problem, logits, outputs, weighted_sum(problem, out.logprob))

    return Contestant(run)


def _our_loss(problem: Problem, overwrite: bool) -> Contestant:
    source = problem.logits
    assert source is not None
    scratch = source.clone() if overwrite else source

    def run() -> Outputs:
        logits = scratch.detach().requires_grad_(problem.case.mode == "train")
        out = grpo_loss(
            logits, problem.token_ids, problem.advantage, problem.mask,
            old_logprob=problem.old_logprob, ref_logprob=problem.ref_logprob,
            objective=problem.objective, overwrite_logits=overwrite,
        )  # fmt: skip
        assert out.logprob is not None
        assert out.entropy is not None
        outputs = {"loss": out.loss, "logprob": out.logprob, "entropy": out.entropy}
        return finish(problem, logits, outputs, out.loss)

    def restore() -> None:
        scratch.copy_(source)

    return Contestant(run, restore) if overwrite else Contestant(run)


@provider("loss", "fastgrpo", ours=True, entropy=True, skips="mask, zero coefficient")
def our_loss(problem: Problem) -> Contestant:
    """`grpo_loss` with a gradient of its own."""
    return _our_loss(problem, overwrite=False)


@provider("loss", "fastgrpo in place", ours=True, entropy=True, skips="mask, zero coefficient")
def our_loss_in_place(problem: Problem) -> Contestant:
    """`grpo_loss` with the gradient in the logits' memory."""
    return _our_loss(problem, overwrite=True)


def _bandwidth(problem: Problem) -> Contestant:
    source = problem.logits
    assert source is not None
    if problem.case.mode == "forward":
        return Contestant(lambda: {"floor": source.view(torch.int16).amax()})
    scratch = source.clone()
    return Contestant(lambda: {"floor": scratch.mul_(1.0)})


@provider("logprob", "bandwidth floor", floor=True, note="one read; train: plus one read and write")
def logprob_floor(problem: Problem) -> Contestant:
    """Read the logits once; with gradient, also read and write them once."""
    return _bandwidth(problem)


@provider("loss", "bandwidth floor", floor=True, note="one read and write in place")
def loss_floor(problem: Problem) -> Contestant:
    """Read and write the logits once."""
    return _bandwidth(problem)

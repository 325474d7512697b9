"""From logits: eager PyTorch, torch.compile, TRL, Liger, ours, and the machine's own bandwidth."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastgrpo import grpo_loss, token_logprob
from fastgrpo.bench.problems import EPSILON, Problem, plain_loss, weighted_sum
from fastgrpo.bench.providers.base import Contestant, Outputs, Unavailable, provider

# Log-prob, and entropy or None.
Score = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def leaf(problem: Problem) -> Tensor:
    """The logits as a leaf that requires grad where the mode asks for a gradient."""
    assert problem.logits is not None
    return problem.logits.detach().requires_grad_(problem.case.mode != "forward")


def present(**outputs: Tensor | None) -> Outputs:
    """The outputs that are there."""
    return {name: value for name, value in outputs.items() if value is not None}


def finish(problem: Problem, logits: Tensor, outputs: Outputs, loss: Tensor) -> Outputs:
    """Backward through `loss` if the mode asks for it, and collect the gradient."""
    if problem.case.mode == "train":
        loss.backward()
        assert logits.grad is not None
        outputs["dlogits"] = logits.grad
    return outputs


def eager_score(problem: Problem) -> Score:
    """Log-prob and entropy as a careful user writes them: a float32 log-softmax."""
    with_entropy = problem.case.entropy

    def score(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        x = logits.float().log_softmax(-1)
        logprob = x.gather(-1, token_ids[..., None])[..., 0]
        return logprob, -(x.exp() * x).sum(-1) if with_entropy else None

    return score


def trl_score(problem: Problem) -> Score:
    """Log-prob and entropy by TRL's own functions."""
    from trl.trainer import utils

    def score(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        if problem.case.entropy:
            logprob, entropy = utils.selective_log_softmax_and_entropy(logits, token_ids)
            return logprob, entropy
        return utils.selective_log_softmax(logits, token_ids), None

    return score


class BackwardOnly:
    """Runs the forward untimed, then times the backward."""

    def __init__(self, problem: Problem, score: Score) -> None:
        self.problem, self.score = problem, score

    def prepare(self) -> None:
        """Forward."""
        self.logits = leaf(self.problem)
        logprob, _ = self.score(self.logits, self.problem.token_ids)
        self.loss = weighted_sum(self.problem, logprob)

    def run(self) -> Outputs:
        """Backward."""
        self.loss.backward()
        assert self.logits.grad is not None
        return {"dlogits": self.logits.grad}


def logprob_by(problem: Problem, score: Score) -> Contestant:
    """A log-prob contestant."""
    if problem.case.mode == "backward":
        only = BackwardOnly(problem, score)
        return Contestant(only.run, only.prepare)

    def run() -> Outputs:
        logits = leaf(problem)
        logprob, entropy = score(logits, problem.token_ids)
        outputs = present(logprob=logprob, entropy=entropy)
        return finish(problem, logits, outputs, weighted_sum(problem, logprob))

    return Contestant(run)


def loss_by(problem: Problem, score: Score, whole: bool = False) -> Contestant:
    """A loss contestant: a score function and the plain loss, compiled as a whole on request."""

    def forward(logits: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        logprob, entropy = score(logits, problem.token_ids)
        return plain_loss(problem, logprob), logprob, entropy

    call = torch.compile(forward) if whole else forward

    def run() -> Outputs:
        logits = leaf(problem)
        loss, logprob, entropy = call(logits)
        return finish(problem, logits, present(loss=loss, logprob=logprob, entropy=entropy), loss)

    return Contestant(run)


@provider("logprob", "eager", entropy=True)
def eager_logprob(problem: Problem) -> Contestant:
    """Float32 log-softmax."""
    return logprob_by(problem, eager_score(problem))


@provider("logprob", "torch.compile", entropy=True)
def compiled_logprob(problem: Problem) -> Contestant:
    """The same, compiled."""
    return logprob_by(problem, torch.compile(eager_score(problem)))


@provider("logprob", "TRL", entropy=True, needs="trl")
def trl_logprob(problem: Problem) -> Contestant:
    """TRL's selective log-softmax, with or without entropy (its Triton kernel on a GPU)."""
    return logprob_by(problem, trl_score(problem))


@provider("loss", "eager", entropy=True)
def eager_loss(problem: Problem) -> Contestant:
    """Float32 log-softmax and the loss written out."""
    return loss_by(problem, eager_score(problem))


@provider("loss", "torch.compile", entropy=True)
def compiled_loss(problem: Problem) -> Contestant:
    """The same, compiled as one function."""
    return loss_by(problem, eager_score(problem), whole=True)


@provider("loss", "TRL", entropy=True, needs="trl", note="its log-probs, the loss written out")
def trl_loss(problem: Problem) -> Contestant:
    """TRL's log-probs and the loss written out."""
    return loss_by(problem, trl_score(problem))


@provider("loss", "Liger", needs="liger_kernel", note="gradient in place")
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

    def score(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        out = token_logprob(logits, token_ids, mask=problem.mask, with_entropy=problem.case.entropy)
        return out.logprob, out.entropy

    return logprob_by(problem, score)


def _our_loss(problem: Problem, overwrite: bool) -> Contestant:
    source = problem.logits
    assert source is not None
    scratch = source.clone() if overwrite else source

    def run() -> Outputs:
        logits = scratch.detach().requires_grad_(problem.case.mode == "train")
        out = grpo_loss(
            logits, problem.token_ids, problem.advantage, problem.mask,
            old_logprob=problem.old_logprob, ref_logprob=problem.ref_logprob,
            objective=problem.objective, overwrite_logits=overwrite, with_entropy=problem.case.entropy,
        )  # fmt: skip
        outputs = present(loss=out.loss, logprob=out.logprob, entropy=out.entropy)
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


def _moved(problem: Problem, reads: int, writes: int) -> Contestant:
    """Moves as much memory as `reads` passes over the logits that read and `writes` that read and write.

    GPU: copies, counting both directions; a reduction would be slower than the memory. CPU: a maximum and a scaling in
    place; a copy would also fetch what it overwrites.
    """
    source = problem.logits
    assert source is not None
    scratch = torch.empty_like(source)
    half = source.flatten()[: source.numel() // 2]
    target = scratch.flatten()[: half.numel()]

    def run() -> Outputs:
        for _ in range(reads):
            if source.is_cuda:
                target.copy_(half)
            else:
                source.view(torch.int16).amax()
        for _ in range(writes):
            if source.is_cuda:
                scratch.copy_(source)
            else:
                scratch.mul_(1.0)
        return {}

    return Contestant(run)


@provider(
    "logprob", "bandwidth floor", floor=True, note="forward one read, backward one read and write"
)
def logprob_floor(problem: Problem) -> Contestant:
    """Read the logits once; with gradient, also read and write them once."""
    mode = problem.case.mode
    return _moved(problem, reads=int(mode != "backward"), writes=int(mode != "forward"))


@provider("loss", "bandwidth floor", floor=True, note="forward one read, train one read and write")
def loss_floor(problem: Problem) -> Contestant:
    """Read the logits once; with gradient, read and write them once."""
    training = problem.case.mode == "train"
    return _moved(problem, reads=int(not training), writes=int(training))

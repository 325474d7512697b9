"""Rows of reliability's table 2a: what stands in the logits, the ids and the shape, seen at log-prob and gradient."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.side_by_side.systems import System
from benchmarks.side_by_side.verdicts import (
    OK,
    WRONG,
    compare,
    confined,
    gradient,
    loss_and_gradient,
    refusal,
)
from tests.tools.fence import fenced

INF, NAN = float("inf"), float("nan")


def truth(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and d(sum of log-probs)/dlogits in float64; -inf columns have probability 0."""
    x = (logits.double() - logits.double().amax(-1, keepdim=True)) / temperature
    log_p = torch.log_softmax(x, -1)
    p = log_p.exp()
    entropy = -(p * torch.where(p == 0, 0.0, log_p)).sum(-1)
    onehot = torch.nn.functional.one_hot(ids, logits.shape[-1])
    return log_p.gather(-1, ids[..., None])[..., 0], entropy, (onehot - p) / temperature


def scored(system: System, logits: Tensor, ids: Tensor, temperature: float = 1.0) -> str:
    """Verdict on log-prob and gradient of [1, V]; systems with a loss only: on the loss of one token with A = 1."""
    want = truth(logits, ids, temperature)
    leaf = logits.clone().requires_grad_()
    try:
        logprob = system.score(leaf, ids, temperature)[0]
        return loss_and_gradient(logprob, gradient(logprob, leaf), (want[0], want[2]), 1e-5)
    except NotImplementedError:
        mask = torch.ones(1, len(ids), dtype=torch.bool)
        loss = system.loss(leaf[None], ids[None], torch.ones(1), mask, temperature=temperature)
        return loss_and_gradient(loss, gradient(loss, leaf), (-torch.ones(()), -want[2]), 1e-5)


def top_k_logits() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    kept = torch.randperm(5000, generator=g)[:50]
    logits = torch.full((1, 5000), -INF)
    logits[0, kept] = torch.randn(50, generator=g) * 3
    return logits, kept[:1]


def top_k(system: System) -> str:
    return scored(system, *top_k_logits())


def top_k_entropy(system: System) -> str:
    logits, ids = top_k_logits()
    return compare(system.score(logits, ids)[1], truth(logits, ids)[1], 1e-5)


def leading_block_masked(system: System) -> str:
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(2))
    logits[:, :4096] = -INF
    return scored(system, logits, torch.tensor([4500]))


def huge(system: System) -> str:
    logits = torch.full((1, 64), -1e37)
    logits[0, :3] = 1e37
    return scored(system, logits, torch.tensor([1]), temperature=1e-2)


def one_token_faulty(
    system: System, logits: Tensor, ids: Tensor, row: int, clean: tuple[Tensor, Tensor]
) -> str:
    """A [1, T, V] loss with a fault in one row."""
    tokens = ids.shape[1]
    mask = torch.ones(1, tokens, dtype=torch.bool)
    leaf = logits.detach().requires_grad_()  # not a copy: its memory may be fenced
    faulty = torch.zeros(1, tokens, dtype=torch.bool)
    faulty[0, row] = True
    try:
        loss = system.loss(leaf, ids, torch.ones(1), mask)
        counted = system.faults(logits.detach(), ids, torch.ones(1), mask)
    except NotImplementedError:  # no loss: the sum of the log-probs stands for it
        loss, counted = -system.score(leaf[0], ids[0])[0].sum() / tokens, None
    want = -truth(*clean)[2] / tokens
    grad = gradient(loss, leaf)
    return confined(
        loss.detach(), None if grad is None else grad[:, :tokens], faulty, want, counted
    )


def row_fault(system: System, value: float, whole_row: bool) -> str:
    """-inf in a whole row, or one NaN; systems that multiply by a head see a single row."""
    tokens = 1 if system.one_row_only else 6
    g = torch.Generator().manual_seed(3)
    logits, ids = (
        torch.randn(1, tokens, 40, generator=g),
        torch.randint(40, (1, tokens), generator=g),
    )
    bad = logits.clone()
    bad[0, tokens - 1, slice(None) if whole_row else 7] = value
    return one_token_faulty(system, bad, ids, tokens - 1, (logits, ids))


def all_masked_row(system: System) -> str:
    return row_fault(system, -INF, whole_row=True)


def one_nan(system: System) -> str:
    return row_fault(system, NAN, whole_row=False)


def bad_id(system: System, bad: int) -> str:
    """The memory of the logits ends (or begins) at a protected page, so an outside read shows as SIGSEGV."""
    tokens = 1 if system.one_row_only else 2
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(1, tokens, 1024, generator=g)
    ids = torch.randint(1024, (1, tokens), generator=g)
    row = tokens - 1 if bad > 0 else 0
    wrong = ids.clone()
    wrong[0, row] = bad
    longer = torch.cat([logits, logits[:, :1]], 1) if system.extra_position else logits
    protected = fenced(longer, at_end=bad > 0)
    try:
        return one_token_faulty(system, protected, wrong, row, (logits, ids))
    except NotImplementedError:
        raise
    except Exception as error:
        return f"ERR ({type(error).__name__})"


def ignore_id(system: System) -> str:
    return bad_id(system, -100)


def id_v(system: System) -> str:
    return bad_id(system, 1024)


def bad_temperature(system: System, temperature: float) -> str:
    logits, ids = torch.randn(1, 8), torch.tensor([3])

    def call() -> object:
        try:
            return system.score(logits, ids, temperature)
        except NotImplementedError:
            mask = torch.ones(1, 1, dtype=torch.bool)
            return system.loss(
                logits[None], ids[None], torch.ones(1), mask, temperature=temperature
            )

    return refusal(call, "temperature", "Temperature")


def temperature_zero(system: System) -> str:
    return bad_temperature(system, 0.0)


def temperature_negative(system: System) -> str:
    return bad_temperature(system, -1.0)


def float64(system: System) -> str:
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(1, 3000, generator=g, dtype=torch.float64) * 5
    ids = torch.tensor([17])
    return compare(system.score(logits, ids)[0], truth(logits, ids)[0], 1e-12)


def empty(system: System, batch: int, length: int) -> str:
    """Loss 0 with a graph, or no log-probs at all."""
    logits = torch.randn(batch, length, 9, requires_grad=True)
    ids, mask = (
        torch.zeros(batch, length, dtype=torch.int64),
        torch.ones(batch, length, dtype=torch.bool),
    )
    try:
        loss = system.loss(logits, ids, torch.ones(batch), mask)
    except NotImplementedError:
        if system.one_row_only:
            raise
        logprob = system.score(logits, ids)[0]
        return OK if logprob.shape == ids.shape else WRONG
    except Exception as error:
        return f"ERR ({type(error).__name__})"
    return loss_and_gradient(
        loss.detach(), gradient(loss, logits), (torch.zeros(()), torch.zeros_like(logits)), 0.0
    )


def no_sequence(system: System) -> str:
    return empty(system, 0, 4)


def no_position(system: System) -> str:
    return empty(system, 3, 0)


def transposed(system: System) -> str:
    if system.one_row_only:
        raise NotImplementedError
    g = torch.Generator().manual_seed(6)
    wide = torch.randn(6, 3, 40, generator=g)
    logits, ids = wide.transpose(0, 1), torch.randint(40, (3, 6), generator=g)
    want = truth(logits, ids)
    leaf = logits.detach().requires_grad_()
    try:
        logprob = system.score(leaf, ids)[0]
        return loss_and_gradient(logprob, gradient(logprob, leaf), (want[0], want[2]), 1e-5)
    except NotImplementedError:
        from liger_kernel.transformers.grpo_loss import triton_grpo_loss

        longer = torch.cat([wide, wide[:1]]).transpose(0, 1)
        return refusal(
            lambda: triton_grpo_loss(longer, None, None, ids, torch.ones(3), beta=0.0), "contiguous"
        )


def far_rows(system: System) -> str:
    """Rows 1.2e9 elements apart in a sparse file."""
    if system.one_row_only:
        raise NotImplementedError
    stride, vocabulary = 1_200_000_000, 64
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "logits")
        size = 2 * stride + vocabulary
        with path.open("wb") as file:
            file.truncate(size * 2)
        memory = torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16)
        rows = memory.as_strided((3, vocabulary), (stride, 1))
        rows.copy_(torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(7)))
        ids = torch.tensor([1, 2, 3])
        # a wrong row is off by whole units; bfloat16 arithmetic by hundredths, which is not the question here
        return compare(system.score(rows, ids)[0], truth(rows.clone(), ids)[0], 0.05)


def gradient_penalty(system: System) -> str:
    """loss + |grad|^2: right against float64, or an error; a missing term is the silent case."""
    g = torch.Generator().manual_seed(8)
    logits, ids = torch.randn(1, 20, generator=g), torch.tensor([4])
    wide = logits.double().requires_grad_()
    value = torch.log_softmax(wide, -1)[0, 4]
    (first,) = torch.autograd.grad(value, wide, create_graph=True)
    (want,) = torch.autograd.grad(value + first.square().sum(), wide)
    leaf = logits.clone().requires_grad_()
    try:
        loss = system.score(leaf, ids)[0].sum()
    except NotImplementedError:
        loss = -system.loss(
            leaf[None],
            ids[None],
            torch.ones(1),
            torch.ones(1, 1, dtype=torch.bool),
            temperature=1.0,
        )
    try:
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (total,) = torch.autograd.grad(loss + first.square().sum(), leaf)
    except Exception as error:
        return f"ERR ({type(error).__name__})"
    return compare(total, want, 1e-5)


def functional_grad(system: System) -> str:
    g = torch.Generator().manual_seed(9)
    logits, ids = torch.randn(1, 20, generator=g), torch.tensor([4])

    def function(z: Tensor) -> Tensor:
        try:
            return system.score(z, ids)[0].sum()
        except NotImplementedError:
            return -system.loss(
                z[None], ids[None], torch.ones(1), torch.ones(1, 1, dtype=torch.bool)
            )

    try:
        grad = torch.func.grad(function)(logits)
    except Exception as error:
        return f"ERR ({type(error).__name__})"
    return compare(grad, truth(logits, ids)[2], 1e-5)

"""What the ops allocate, in units of the logits: nothing of that size without gradient, at most one copy with it."""

import contextlib
import os
import resource
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastgrpo import backend_report, grpo_loss, policy_loss, token_logprob

# The eager reference works on whole [N, V] intermediates; the promise is that of the kernels.
pytestmark = pytest.mark.skipif(
    backend_report().ops["grpo_loss"]["cpu"].name != "C++",
    reason="the C++ kernels do not serve this process",
)
B, T, V = 4, 8, 20_000
IDS = torch.zeros(B, T, dtype=torch.int64)
MASK = torch.ones(B, T, dtype=torch.bool)
ADVANTAGE = torch.ones(B)


def allocated(call, logits):
    """Bytes that torch's allocator hands out during the call, as a multiple of the logits."""
    call()  # caches fill
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    sizes = [event.self_cpu_memory_usage for event in record.events()]
    return sum(size for size in sizes if size > 0) / (logits.numel() * logits.element_size())


def losses(logits, overwrite=False):
    return {
        "token_logprob": lambda: token_logprob(logits, IDS, overwrite_logits=overwrite).logprob.sum(),
        "grpo_loss": lambda: grpo_loss(logits, IDS, ADVANTAGE, MASK, overwrite_logits=overwrite).loss,
        "two_step": lambda: policy_loss(
            token_logprob(logits, IDS, overwrite_logits=overwrite).logprob, ADVANTAGE, MASK
        ).loss,
    }  # fmt: skip


NAMES = ("token_logprob", "grpo_loss", "two_step")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__
)
def test_no_gradient_memory_without_gradient(name, dtype, mode):
    logits = torch.randn(B, T, V).to(dtype).requires_grad_()

    def call():
        with mode():
            losses(logits)[name]()

    assert allocated(call, logits) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_one_gradient_or_none(name, dtype, overwrite):
    """A leaf takes over the buffer that the op wrote; overwritten logits are that buffer."""
    logits = torch.randn(B, T, V).to(dtype).requires_grad_()

    def call():
        logits.grad = None
        losses(logits, overwrite)[name]().backward()

    share = allocated(call, logits)
    if overwrite:
        assert share < 0.02
    else:
        assert 1.0 <= share < 1.02


@pytest.mark.parametrize("name", NAMES)
def test_running_out_of_memory_changes_no_input(name):
    """In a process that may not have a second copy of the logits: an error, the same bits, and the next call works."""
    logits = torch.randn(B, T, V * 80)  # 205 MB: more than glibc keeps in store
    kept = logits.clone()
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            room = size + logits.nbytes // 2
            resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
            leaf = logits.requires_grad_()
            try:
                losses(leaf)[name]().backward()
            except RuntimeError as error:
                code = 0 if "memory" in str(error) else 2
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            leaf.grad = None
            losses(leaf)[name]().backward()
            code = code or (0 if torch.equal(leaf.detach(), kept) else 3)
            code = code or (0 if bool(leaf.grad.isfinite().all()) else 4)
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

"""Settings of every test: one CPU thread, a fixed seed, GPU tests skipped where there is no GPU."""

import os
import signal
from pathlib import Path

# Before torch is imported: the pytest workers share the cores, and idle OpenMP threads must not spin on them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

# A shell gives its background jobs an ignored Ctrl-C, which all processes that tests start would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave the interpreter tests to a process of their own: they turn Triton into an interpreter for good."""
    asked = any("interpreter" in argument for argument in config.args)
    return True if collection_path.name == "interpreter" and not asked else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` without a CUDA device, saying so."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)

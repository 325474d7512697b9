"""Measured peaks: each contender in a fresh process, so that nothing is left over from another."""

import json
import subprocess
import sys
from dataclasses import asdict

import torch

from fastgrpo.planner.formulas import DTYPES, TRL_COLUMNS, Case


def run(name: str, case: Case) -> None:
    """One forward and backward of a contender."""
    g = torch.Generator().manual_seed(0)
    dtype, device = DTYPES[case.dtype], torch.device(case.device)
    shape = (1, case.tokens)
    hidden = torch.randn(*shape, case.hidden, generator=g).to(device, dtype).requires_grad_()
    weight = torch.randn(case.vocabulary, case.hidden, generator=g).mul_(0.02).to(device, dtype)
    weight.requires_grad_(not case.frozen)
    ids = torch.randint(case.vocabulary, shape, generator=g).to(device)
    token_weight = (torch.rand(shape, generator=g) < case.active).float().to(device)
    peak = Peak(device)
    if name == "fastgrpo":
        from fastgrpo.linear_losses import linear_grpo_loss

        mask = torch.ones(shape, dtype=torch.bool, device=device)
        loss = linear_grpo_loss(
            hidden, weight, ids, torch.ones(1, device=device), mask, token_weight=token_weight,
            logits_precision=case.precision, workspace_bytes=case.workspace_bytes,  # type: ignore[arg-type]
        ).loss  # fmt: skip
    elif name == "eager":
        logprob = (hidden @ weight.t()).float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        loss = -(logprob * token_weight).mean()
    else:
        from trl.trainer.utils import _ChunkedLogProbFunction

        logprob = _ChunkedLogProbFunction.apply(
            hidden[0], weight, None, ids[0], 1.0, TRL_COLUMNS, None, 1.0, ()
        )[0]
        loss = -(logprob * token_weight[0]).mean()
    loss.backward()
    print(json.dumps(peak.read()))


class Peak:
    """Peak memory above what is in use when this is made."""

    def __init__(self, device: torch.device) -> None:
        """Start from here."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            with open("/proc/self/clear_refs", "w") as refs:
                refs.write("5")
            self.before = self._status("VmRSS")

    def read(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return self._status("VmHWM") - self.before

    @staticmethod
    def _status(key: str) -> int:
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def measure(name: str, case: Case) -> int:
    """Measured peak of a contender, in a fresh process that has run a small case before."""
    small = Case(hidden=64, vocabulary=512, tokens=16, dtype=case.dtype, device=case.device)
    code = (
        "import sys, json; from fastgrpo.planner.peaks import Case, run; name, *cases = json.load(sys.stdin); "
        "[run(name, Case(**case)) for case in cases]"
    )
    given = json.dumps([name, asdict(small), asdict(case)])
    done = subprocess.run(
        [sys.executable, "-c", code], input=given, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"measuring {name} failed: {done.stderr.strip().splitlines()[-1]}")
    return int(done.stdout.split()[-1])

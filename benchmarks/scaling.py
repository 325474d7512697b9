"""Cost of every op on a CPU against tokens N, vocabulary V, hidden size H, active share and groups, and its model.

    python -m benchmarks.scaling [--small]     writes benchmarks/results/scaling.json and scaling.png

Processor time of one thread, medians. The model of an op is a sum of terms that say where the time goes: calls, passes
over the logits, products. Their costs are fitted by least squares on relative errors, none below 0. A point far from
its model is a cost that the terms do not know.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from datetime import date
from itertools import product
from pathlib import Path

if __name__ == "__main__":  # before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from fastgrpo import (
    Objective,
    group_advantage,
    grpo_loss,
    linear_grpo_loss,
    policy_loss,
    token_logprob,
)
from fastgrpo.bench.measure import Clock
from fastgrpo.bench.run import environment

RESULTS = Path(__file__).resolve().parent / "results"
CPU = torch.device("cpu")
LENGTH = 32  # tokens per completion
Point = dict[str, float]
Call = Callable[[], object]
Cases = Callable[[bool], Iterator[tuple[Point, Call]]]
Terms = tuple[tuple[str, Callable[[Point], float]], ...]


def logits_problem(tokens: int, vocabulary: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """bf16 logits [B, T, V] and the sides of a loss."""
    shape = (tokens // LENGTH, LENGTH)
    logits = (torch.randn(*shape, vocabulary) * 4).bfloat16()
    logprob = -torch.rand(shape)
    sides = {
        "advantage": torch.randn(shape[0]), "mask": torch.ones(shape, dtype=torch.bool), "old_logprob": logprob,
    }  # fmt: skip
    return logits, sides


def logprob_cases(small: bool) -> Iterator[tuple[Point, Call]]:
    """Forward from logits, with entropy."""
    for n, v in product(
        (32, 64) if small else (32, 64, 128, 256),
        (1000, 2000) if small else (8000, 32_000, 128_000),
    ):
        logits, _ = logits_problem(n, v)
        ids = torch.randint(0, v, logits.shape[:2])
        yield {"N": n, "V": v}, lambda z=logits, i=ids: token_logprob(z, i, with_entropy=True)


def loss_cases(small: bool) -> Iterator[tuple[Point, Call]]:
    """Loss and gradient from logits, in place."""
    for n, v in product(
        (32, 64) if small else (32, 64, 128, 256),
        (1000, 2000) if small else (8000, 32_000, 128_000),
    ):
        logits, sides = logits_problem(n, v)
        ids = torch.randint(0, v, logits.shape[:2])

        def run(z=logits, i=ids, s=sides) -> None:
            leaf = z.detach().requires_grad_()
            grpo_loss(leaf, i, **s, overwrite_logits=True).loss.backward()

        yield {"N": n, "V": v}, run


def linear_cases(small: bool) -> Iterator[tuple[Point, Call]]:
    """Loss and gradients from hidden states; inactive rows masked (no product) or of advantage 0 (one of three)."""
    sizes = ((64,), (500,), (16, 32)) if small else ((128, 256, 512), (8000, 32_000), (128, 512))
    for n, v, h in product(*sizes):
        for active, by in ((1.0, "mask"), (0.5, "mask"), (0.5, "advantage"), (0.25, "advantage")):
            shape = (n // LENGTH, LENGTH)
            hidden = torch.randn(*shape, h).bfloat16().requires_grad_()
            weight = (torch.randn(v, h) * 4 / h**0.5).bfloat16().requires_grad_()
            ids = torch.randint(0, v, shape)
            mask, advantage = torch.ones(shape, dtype=torch.bool), torch.randn(shape[0])
            if by == "mask":
                mask &= torch.arange(LENGTH) < round(LENGTH * active)
            else:
                advantage[round(len(advantage) * active) :] = 0.0
            scored = float(mask.sum())
            used = float((mask & (advantage != 0)[:, None]).sum())

            def run(hidden=hidden, weight=weight, ids=ids, advantage=advantage, mask=mask) -> None:
                hidden.grad = weight.grad = None
                linear_grpo_loss(
                    hidden, weight, ids, advantage, mask, with_entropy=False
                ).loss.backward()

            yield {"N": n, "V": v, "H": h, "active": active, "scored": scored, "used": used}, run


def policy_cases(small: bool) -> Iterator[tuple[Point, Call]]:
    """From log-probs to the loss and its derivative."""
    for n in (64, 128) if small else (256, 1024, 4096, 16_384, 65_536):
        logprob = -torch.rand(n // LENGTH, LENGTH)
        mask, advantage = torch.ones(logprob.shape, dtype=torch.bool), torch.randn(len(logprob))
        yield (
            {"N": n},
            lambda p=logprob, a=advantage, m=mask: policy_loss(
                p, a, m, old_logprob=p, ref_logprob=p, objective=Objective.grpo(beta=0.04)
            ),
        )


def advantage_cases(small: bool) -> Iterator[tuple[Point, Call]]:
    """From rewards to advantages, groups of 8."""
    for groups in (8, 16) if small else (8, 64, 512, 4096, 16_384):
        reward = torch.rand(groups * 8)
        yield {"groups": groups}, lambda r=reward: group_advantage(r, group_size=8)


# Op -> cases, and the terms of its model by name: what one unit of each costs is fitted.
CONSTANT = ("call", lambda p: 1.0)
OPS: dict[str, tuple[Cases, Terms]] = {
    "token_logprob forward": (logprob_cases, (CONSTANT, ("N·V/1e6", lambda p: p["N"] * p["V"] / 1e6))),
    "grpo_loss in place": (loss_cases, (CONSTANT, ("N·V/1e6", lambda p: p["N"] * p["V"] / 1e6))),
    "linear_grpo_loss": (
        linear_cases,
        (
            CONSTANT,
            ("(scored + 2 active)·V·H/1e9", lambda p: (p["scored"] + 2 * p["used"]) * p["V"] * p["H"] / 1e9),
            ("scored·V/1e6", lambda p: p["scored"] * p["V"] / 1e6),
            ("V·H/1e6", lambda p: p["V"] * p["H"] / 1e6),
        ),
    ),
    "policy_loss": (policy_cases, (CONSTANT, ("N/1e3", lambda p: p["N"] / 1e3))),
    "group_advantage": (advantage_cases, (CONSTANT, ("groups/1e3", lambda p: p["groups"] / 1e3))),
}  # fmt: skip


def measure(cases: Iterator[tuple[Point, Call]], repeats: int) -> list[Point]:
    """Median processor time of each case; what takes microseconds is called many times."""
    points = []
    for point, run in cases:
        run()
        quick = "V" not in point
        clock = Clock(CPU, calls=20 if quick else 1)
        points.append(
            point | {"ms": statistics.median(clock.time(run)[0] for _ in range(repeats)) * 1e3}
        )
    return points


def fit(points: list[Point], terms: Terms) -> tuple[np.ndarray, np.ndarray]:
    """Costs of the terms (none negative) that minimise the relative errors, and the fitted times."""
    design = np.array([[value(point) for _, value in terms] for point in points])
    ms = np.array([point["ms"] for point in points])
    keep = list(range(len(terms)))
    while True:  # drop terms that would cost less than nothing
        costs, *_ = np.linalg.lstsq(design[:, keep] / ms[:, None], np.ones(len(ms)), rcond=None)
        if (costs >= 0).all() or len(keep) == 1:
            break
        del keep[int(costs.argmin())]
    full = np.zeros(len(terms))
    full[keep] = costs
    return full, design @ full


def plot(path: Path, study: dict[str, list[Point]]) -> None:
    """Measured against fitted time; the diagonal is a perfect model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, len(study), figsize=(3.2 * len(study), 3.2))
    for axis, (op, points) in zip(axes, study.items(), strict=True):
        fitted, ms = [p["fitted_ms"] for p in points], [p["ms"] for p in points]
        ends = (min(fitted + ms), max(fitted + ms))
        axis.plot(ends, ends, color="#999999", linewidth=1)
        axis.scatter(fitted, ms, s=14, color="#2e86c1")
        axis.set(xscale="log", yscale="log", xlabel="fitted ms")
        axis.set_title(op, fontsize=9)
        axis.minorticks_off()
        for line in (axis.xaxis, axis.yaxis):
            line.set_major_locator(ticker.LogLocator(subs=(1.0, 3.0)))
            line.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes[0].set_ylabel("measured CPU ms")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Measure, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes: a rehearsal")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    study, fits = {}, []
    for op, (cases, terms) in OPS.items():
        points = measure(cases(args.small), 3 if args.small else 7)
        costs, fitted = fit(points, terms)
        ms = np.array([point["ms"] for point in points])
        log_error = np.log(ms) - np.log(fitted)
        spread = np.log(ms) - np.log(ms).mean()
        formula = " + ".join(
            f"{cost:.3g}" + ("" if name == "call" else f" · {name}")
            for cost, (name, _) in zip(costs, terms, strict=True) if cost
        )  # fmt: skip
        r2 = 1 - float((log_error**2).sum() / (spread**2).sum())
        worst = float(np.abs(fitted / ms - 1).max())
        fits.append(
            {"op": op, "formula": formula, "costs_ms": costs.tolist(), "r2": r2, "worst": worst}
        )
        study[op] = [p | {"fitted_ms": float(f)} for p, f in zip(points, fitted, strict=True)]
        print(f"{op:24} {formula}   R2 {r2:.3f}, worst point {worst:.0%} off")
    e = environment(CPU, 0)
    pages = "on" if e["thp"] else "off"
    about = (
        f"{e['device']}, {e['cpu_isa']}, 1 thread, huge pages {pages}, torch {e['versions']['torch']}, "
        f"{date.today()}, commit {e['git']}; bf16, medians of processor time, R² of the logarithms."
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scaling.json").write_text(
        json.dumps({"about": about, "fits": fits, "points": study}, indent=1) + "\n"
    )
    plot(args.out / "scaling.png", study)
    return 0


if __name__ == "__main__":
    sys.exit(main())

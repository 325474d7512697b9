"""Fuzzing of the losses against the float64 reference: shapes, dtypes, layouts, masks, objectives and special values.

`python -m tests.tools.fuzz --cases 100000 [--seed 1]` runs a campaign; `tests/ops/test_fuzz.py` a fixed share of it. A
case fails if any output is finite and off by more than 8 derived tolerances, if NaN and infinity do not stand where the
reference has them, or if something crashes. Where a ratio lies so close to a threshold that rounding decides the side,
the reference itself changes its mind under a perturbation of that size, and only the continuous outputs are compared.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as with_seed
from torch import Tensor

import fastgrpo
from fastgrpo.testing import assert_matches_reference
from tests.ops.common import INF, LINEAR_PATHS, Scored, reference_score, score
from tests.ops.tolerance import Tolerance, largest, loss_tolerance
from tests.tools.fuzz_plans import DTYPES, PLANS, Plan, make_case, poison, possible

SLACK = 8
EDGES = (
    "clip_low",
    "clip_high",
    "clip_dual",
    "gate_closed",
    "clamp_log_ratio",
    "clamp_kl",
    "active",
)


def at_an_edge(
    tensors: tuple[Tensor, ...], options: dict[str, Any], expected: Scored, tol: Tolerance
) -> bool:
    """Whether a perturbation of the size of rounding moves a token over a threshold of the objective."""
    for sign in (1.0, -1.0):
        moved = dict(options)
        for name, direction in (
            ("old_logprob", sign),
            ("ref_logprob", sign),
            ("rollout_logprob", -sign),
        ):
            if name in moved:
                moved[name] = moved[name].double() + direction * SLACK * tol.logprob
        other = reference_score(*tensors, **moved)
        rows = [*EDGES, *(n for n in other.metrics.names if n.startswith("rollout_weight"))]
        for name in rows:
            a, b = float(other.metrics.sum(name)), float(expected.metrics.sum(name))
            if abs(a - b) > 1e-2 or float(other.metrics.count()) != float(expected.metrics.count()):
                return True
    return False


def check(plan: Plan, dtype: torch.dtype) -> str:
    """Run one case; returns "compared" or "edge"."""
    plan = possible(plan)
    tensors, options = make_case(plan, dtype)
    mask, advantage = tensors[3], tensors[2]
    expected = reference_score(*tensors, **options)
    given_tensors, given_options = poison(mask, tensors, options)
    if (
        plan.overwrite
        and plan.path == "one_pass"
        and plan.layout != "sliced"
        and plan.layout != "transposed"
    ):
        given_options["overwrite_logits"] = True
    given_tensors = (
        given_tensors[0].clone(memory_format=torch.preserve_format),
        *given_tensors[1:],
    )
    actual = score(plan.path, *given_tensors, **given_options)
    logit_options = (options["temperature"], options["logit_scale"], options["logit_softcap"])
    tol = Tolerance.of(tensors[0][mask] if bool(mask.any()) else tensors[0], *logit_options)
    if (
        plan.objective == "gate_mask"
    ):  # the one-pass op does not score what the gate takes out of the mask
        scored = expected.logprob != 0
        actual.logprob, actual.entropy = (
            actual.logprob.where(scored, 0.0),
            actual.entropy.where(scored, 0.0),
        )
    compare(actual.logprob, expected.logprob, tol.logprob)
    compare(actual.entropy, expected.entropy, tol.entropy(largest(expected.entropy)))
    try:
        compare_loss(actual, expected, advantage, options, tol, plan.path in LINEAR_PATHS)
    except AssertionError:
        if at_an_edge(tensors, options, expected, tol):
            return "edge"
        raise
    return "compared"


def compare(actual: Tensor, expected: Tensor, atol: float) -> None:
    """Within SLACK tolerances, with NaN and infinities in the same places."""
    eps = torch.finfo(actual.dtype).eps
    limit = torch.finfo(actual.dtype).max
    expected = expected.double()
    expected = torch.where(
        expected.abs() > limit, expected.sign() * INF, expected
    )  # beyond the output's range
    assert_matches_reference(actual, expected, atol=SLACK * atol, rtol=SLACK * eps)


def compare_loss(
    actual: Scored,
    expected: Scored,
    advantage: Tensor,
    options: dict[str, Any],
    tol: Tolerance,
    linear: bool,
) -> None:
    """Loss, token losses, gradient and the metrics that are sums of indicators."""
    objective = options["objective"]
    bounds = loss_tolerance(tol, expected, advantage, objective)
    compare(actual.token_loss, expected.token_loss, bounds.token)
    compare(actual.loss, expected.loss, bounds.loss)
    dtype = actual.dlogits.dtype
    atol = tol.dlogits(bounds.upstream, dtype, bounds.upstream_error)
    inside = torch.ones_like(expected.dlogits, dtype=torch.bool)
    if (
        dtype == torch.float16 and expected.weight
    ):  # stored times the default grad_scale, at most 1.5 / weight
        inside = ~(
            expected.dlogits.abs() * max(1.5 / expected.weight, 1.0) > torch.finfo(dtype).max
        )
    if linear and not bool(
        expected.dlogits.isfinite().all()
    ):  # the weight's gradient is a sum over rows
        assert not bool(actual.dlogits.isfinite().all()), "an infinite gradient is not visible"
    else:
        compare(actual.dlogits.where(inside, 0.0), expected.dlogits.where(inside, 0.0), atol)
    size = expected.dlogprob.abs()
    smallest = max(SLACK * bounds.upstream_error, torch.finfo(torch.float32).tiny)
    undecided = int(((size > 0) & (size <= smallest)).sum())  # rounding says whether these are 0
    for name in (*EDGES, "fault"):
        difference = abs(float(actual.metrics.sum(name)) - float(expected.metrics.sum(name)))
        assert difference <= (undecided if name == "active" else 0), name
    assert float(actual.metrics.count()) == float(expected.metrics.count())


def main() -> int:
    """Run a campaign, print how many cases were compared, and perhaps write that down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the counts")
    options = parser.parse_args()
    start, by_dtype = time.process_time(), {}
    for dtype in DTYPES:
        counts = {"compared": 0, "edge": 0}
        run_campaign(dtype, options.cases // len(DTYPES), options.seed, counts)
        by_dtype[str(dtype).removeprefix("torch.")] = counts
        seconds = time.process_time() - start
        print(
            f"{dtype}: {counts['compared']} compared, {counts['edge']} at an edge; {seconds:.0f} s so far",
            flush=True,
        )
    if options.output is not None:
        record = {
            "cases": sum(sum(counts.values()) for counts in by_dtype.values()),
            "seed": options.seed,
            "failures": 0,  # the first one would have ended the campaign with the smallest case that shows it
            "by_dtype": by_dtype,
            "cpu_s": round(time.process_time() - start),
            "torch": torch.__version__,
            "fastgrpo": fastgrpo.__version__,
        }
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def run_campaign(dtype: torch.dtype, cases: int, seed: int | None, counts: dict[str, int]) -> None:
    """Run this many cases of one dtype; without a seed always the same ones. Raises on the smallest failure."""

    @settings(
        max_examples=cases, deadline=None, database=None, derandomize=seed is None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(plan=PLANS)
    def campaign(plan: Plan) -> None:
        counts[check(plan, dtype)] += 1

    (campaign if seed is None else with_seed(seed)(campaign))()


if __name__ == "__main__":
    sys.exit(main())

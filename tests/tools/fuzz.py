"""Fuzzing of the losses against the float64 reference: shapes, dtypes, layouts, masks, objectives and special values.

`python -m tests.tools.fuzz --cases 100000 [--seed 1]` runs a campaign; `tests/ops/test_fuzz.py` a fixed share of it. A
case fails if any output is finite and off by more than 8 derived tolerances, if NaN and infinity do not stand where the
reference has them, or if something crashes. Where a ratio lies so close to a threshold that rounding decides the side,
the reference itself changes its mind under a perturbation of that size, and only the continuous outputs are compared.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from torch import Tensor

from fastgrpo.testing import assert_matches_reference
from tests.ops.common import INF, NAN, OBJECTIVES, PATHS, Scored, reference_score, score
from tests.ops.tolerance import Tolerance, largest, loss_tolerance

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SLACK = 8
LAYOUTS = ("contiguous", "offset", "row stride", "transposed", "sliced")
LOGITS = (
    "normal",
    "peaked",
    "huge",
    "-inf columns",
    "-inf anywhere",
    "NaN",
    "+inf",
    "all -inf",
    "equal",
)
IDS = ("drawn", "drawn", "drawn", "out of range")
MASKS = ("all", "ragged", "random", "none", "one row")
ADVANTAGES = ("normal", "per token", "zero", "large", "equal")
RATIOS = (
    0.0,
    1e-3,
    0.2,
    3.0,
    60.0,
    INF,
)  # noise of the other policies' log-probs; the last one puts in infinities
EDGES = (
    "clip_low",
    "clip_high",
    "clip_dual",
    "gate_closed",
    "clamp_log_ratio",
    "clamp_kl",
    "active",
)


@dataclass(frozen=True)
class Plan:
    """Everything that a case is made of; small values first, so that Hypothesis shrinks towards the plain case."""

    seed: int
    path: str
    batch: int
    length: int
    vocabulary: int
    layout: str
    logits: str
    ids: str
    mask: str
    advantage: str
    ratio: float
    objective: str
    old: bool
    temperature: float | str
    scale: float
    softcap: float | None
    packed: bool
    weights: bool
    normalizer: float | None
    overwrite: bool


PLANS = st.builds(
    Plan,
    seed=st.integers(0, 2**20),
    path=st.sampled_from(PATHS),
    batch=st.integers(1, 4),
    length=st.integers(0, 5),
    vocabulary=st.sampled_from((5, 1, 2, 3, 8, 16, 31, 33, 64, 100, 257, 1025)),
    layout=st.sampled_from(LAYOUTS),
    logits=st.sampled_from(LOGITS),
    ids=st.sampled_from(IDS),
    mask=st.sampled_from(MASKS),
    advantage=st.sampled_from(ADVANTAGES),
    ratio=st.sampled_from(RATIOS),
    objective=st.sampled_from(tuple(OBJECTIVES)),
    old=st.booleans(),
    temperature=st.sampled_from((1.0, 0.3, 2.5, "per row")),
    scale=st.sampled_from((1.0, 0.1, 4.0)),
    softcap=st.sampled_from((None, None, 2.0, 30.0)),
    packed=st.booleans(),
    weights=st.booleans(),
    normalizer=st.sampled_from((None, 3.0)),
    overwrite=st.booleans(),
)


def make_logits(plan: Plan, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """[B, T, V] with the plan's special values."""
    shape = (plan.batch, plan.length, plan.vocabulary)
    values = torch.randn(shape, generator=g) * {"peaked": 15.0, "huge": 3e4, "equal": 0.0}.get(
        plan.logits, 3.0
    )
    where = torch.rand(shape, generator=g) < 0.3
    row = torch.rand(shape[:2], generator=g) < 0.3
    if plan.logits == "-inf columns":
        values[..., : plan.vocabulary // 2] = -INF
    elif plan.logits == "-inf anywhere":
        values = values.masked_fill(where, -INF)
    elif plan.logits in ("NaN", "+inf"):
        bad = NAN if plan.logits == "NaN" else INF
        values = values.masked_fill(where & row[..., None], bad)
    elif plan.logits == "all -inf":
        values = values.masked_fill(row[..., None], -INF)
    return values.to(dtype)


def lay_out(plan: Plan, logits: Tensor) -> Tensor:
    """The same values with other strides."""
    if plan.layout == "offset":
        memory = torch.empty(logits.numel() + 3, dtype=logits.dtype)
        return memory[3:].copy_(logits.flatten()).view(logits.shape)
    if plan.layout == "row stride":
        return torch.cat([logits, logits[..., :3], logits], -1)[..., : plan.vocabulary]
    if plan.layout == "transposed":
        return logits.transpose(0, 1).contiguous().transpose(0, 1)
    if plan.layout == "sliced":
        return torch.cat([logits, logits[:, :1]], 1)[:, : plan.length]
    return logits


def make_mask(plan: Plan, g: torch.Generator) -> Tensor:
    """[B, T] bool."""
    shape = (plan.batch, plan.length)
    if plan.mask == "ragged":
        lengths = torch.randint(0, plan.length + 1, (plan.batch, 1), generator=g)
        return torch.arange(plan.length) < lengths
    if plan.mask == "random":
        return torch.rand(shape, generator=g) < 0.6
    mask = torch.full(shape, plan.mask != "none")
    if plan.mask == "one row":
        mask[0] = False
    return mask


def make_case(plan: Plan, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Positional tensors (logits, token_ids, advantage, mask) and options of a loss."""
    g = torch.Generator().manual_seed(plan.seed)
    logits, mask = make_logits(plan, dtype, g), make_mask(plan, g)
    shape = mask.shape
    ids = torch.randint(plan.vocabulary, shape, generator=g)
    if plan.ids == "out of range":
        ids = torch.where(torch.rand(shape, generator=g) < 0.3, ids - plan.vocabulary, ids)
    advantage = torch.randn(shape[0], generator=g)
    if plan.advantage == "per token":
        advantage = torch.randn(shape, generator=g)
    elif plan.advantage != "normal":
        advantage = {"zero": 0.0, "large": 1e4, "equal": 1.0}[plan.advantage] * torch.ones_like(
            advantage
        )

    def near(offset: float) -> Tensor:
        """Log-probs of another policy: the policy's own up to noise, where it is finite."""
        own = torch.log_softmax(logits.double().nan_to_num(0.0, 50.0, -50.0), -1)
        own = own.gather(-1, ids.clamp(0, plan.vocabulary - 1)[..., None])[..., 0].float()
        noise = torch.randn(shape, generator=g)
        if plan.ratio == INF:
            return torch.where(noise > 1.0, -INF, own + noise)
        return own + offset * plan.ratio * noise

    options: dict[str, Any] = {
        "objective": OBJECTIVES[plan.objective], "ref_logprob": near(1.0), "rollout_logprob": near(0.5),
        "group_ids": torch.randint(0, 2, shape[:1], generator=g), "normalizer": plan.normalizer,
        "logit_scale": plan.scale, "logit_softcap": plan.softcap, "temperature": plan.temperature,
    }  # fmt: skip
    objective = OBJECTIVES[plan.objective]
    if (
        plan.old
        or objective.correction
        or any(gate.between == "old_rollout" for gate in objective.gates)
    ):
        options["old_logprob"] = near(1.0)
    if plan.weights:
        options["token_weight"] = torch.rand(shape, generator=g).round(decimals=1)
        options["kl_weight"] = torch.rand(shape, generator=g)
    if plan.temperature == "per row":
        options["temperature"] = 0.3 + 2 * torch.rand(shape, generator=g)
    logits = lay_out(plan, logits)
    if plan.packed:
        flat = {
            k: v.flatten() for k, v in options.items() if isinstance(v, Tensor) and v.shape == shape
        }
        offsets = torch.arange(plan.batch + 1, dtype=torch.int32) * plan.length
        per_token = advantage.flatten() if advantage.dim() == 2 else advantage
        if per_token.shape[0] == mask.numel() != plan.batch or advantage.dim() == 1:
            return (logits.flatten(0, 1), ids.flatten(), per_token, mask.flatten()), {
                **options, **flat, "cu_seqlens": offsets,
            }  # fmt: skip
    return (logits, ids, advantage, mask), options


def poison(mask: Tensor, tensors: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """Put NaN and an impossible id into every masked slot."""
    logits, ids, advantage, _ = tensors
    logits = logits.masked_fill(~mask[..., None], NAN) if not mask.all() else logits
    poisoned = {
        k: v.masked_fill(~mask, NAN) if isinstance(v, Tensor) and v.is_floating_point() and v.shape == mask.shape
        and k != "temperature" else v
        for k, v in options.items()
    }  # fmt: skip
    return (logits, ids.masked_fill(~mask, -7), advantage, mask), poisoned


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
        compare_loss(actual, expected, advantage, options, tol)
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
    actual: Scored, expected: Scored, advantage: Tensor, options: dict[str, Any], tol: Tolerance
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
    compare(actual.dlogits.where(inside, 0.0), expected.dlogits.where(inside, 0.0), atol)
    size = expected.dlogprob.abs()
    underflows = bool(((size > 0) & (size < torch.finfo(torch.float32).tiny)).any())
    for name in (*EDGES, "fault"):
        if name == "active" and underflows:
            continue
        assert float(actual.metrics.sum(name)) == float(expected.metrics.sum(name)), name
    assert float(actual.metrics.count()) == float(expected.metrics.count())


def main() -> int:
    """Run a campaign and print how many cases were compared."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts = {"compared": 0, "edge": 0}
    start = time.perf_counter()
    for dtype in DTYPES:
        run_campaign(dtype, options.cases // len(DTYPES), options.seed, counts)
        seconds = time.perf_counter() - start
        print(
            f"{dtype}: so far {counts['compared']} compared, {counts['edge']} at an edge, {seconds:.0f} s"
        )
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

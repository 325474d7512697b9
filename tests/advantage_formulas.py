"""Advantage formulas written a second time, as plain Python loops: nothing is shared with the package."""

import math
from collections.abc import Sequence
from fractions import Fraction


def groups_of(ids: Sequence[int]) -> list[list[int]]:
    """Rows of each group, in order of first appearance."""
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(ids):
        rows.setdefault(group, []).append(row)
    return list(rows.values())


def mean_std(values: Sequence[float], ddof: int) -> tuple[float, float]:
    """Mean and standard deviation, exactly rounded sums of exact differences."""
    exact = [Fraction(v) for v in values]
    mean = sum(exact) / len(exact)
    if len(exact) <= ddof:
        return float(mean), 0.0
    variance = sum((v - mean) ** 2 for v in exact) / (len(exact) - ddof)
    return float(mean), math.sqrt(variance)


def score_of(row: Sequence[float], weights: Sequence[float]) -> float:
    """Weighted sum of the rewards that are there; NaN if none is."""
    given = [w * r for r, w in zip(row, weights, strict=True) if not math.isnan(r)]
    return math.fsum(given) if given else math.nan


def advantages(
    score: Sequence[float],
    ids: Sequence[int],
    *,
    baseline: str,
    scale: str,
    eps: float,
    ddof: int,
    lengths: Sequence[float],
    singleton: str,
) -> list[float]:
    """Advantage of every row, definition by definition."""
    result = [0.0] * len(score)
    everybody = [s for s in score if not math.isnan(s)]
    batch_mean, batch_std = mean_std(everybody, ddof) if everybody else (0.0, 0.0)
    for rows in groups_of(ids):
        members = [r for r in rows if not math.isnan(score[r])]
        values = [score[r] for r in members]
        if not values:
            continue
        mean, std = mean_std(values, ddof)
        equal = len(set(values)) == 1
        for r in members:
            x = score[r]
            others = [score[o] for o in members if o != r]
            base, divisor = 0.0, 1.0
            if baseline == "mean":
                base = mean
            elif baseline == "leave_one_out" and others:
                base = math.fsum(others) / len(others)
            elif baseline == "length_weighted":
                total = math.fsum(lengths[o] for o in members)
                share = [lengths[o] / total if total else 1 / len(members) for o in members]
                base = math.fsum(w * score[o] for w, o in zip(share, members, strict=True))
            elif baseline == "second_best" and others:
                best = next(o for o in members if score[o] == max(values))
                base = max(others) if r == best else x
            elif baseline == "batch":
                base = batch_mean
            if scale == "group":
                divisor = std + eps
            elif scale == "batch":
                divisor = batch_std + eps
            elif scale == "mean":
                divisor = mean
            relative = baseline not in ("none", "batch") or scale in ("group", "mean")
            if relative and singleton == "raw" and len(members) == 1:
                base = 0.0 if baseline not in ("none", "batch") else base
                divisor = 1.0 if scale in ("group", "mean") else divisor
            elif (relative and equal) or divisor <= 0:
                continue
            if scale == "batch" and batch_std == 0:
                continue
            result[r] = (x - base) / divisor
    return result


def gdpo(
    reward: Sequence[Sequence[float]], ids: Sequence[int], weights: Sequence[float], eps: float
) -> list[float]:
    """Weighted sum of group z-scores per column, then whitened over the batch (TRL's normalize_then_sum)."""
    total = [math.nan] * len(reward)
    for k, weight in enumerate(weights):
        column = [row[k] for row in reward]
        z = advantages(
            column,
            ids,
            baseline="mean",
            scale="group",
            eps=eps,
            ddof=1,
            lengths=[],
            singleton="zero",
        )
        for r, value in enumerate(column):
            if not math.isnan(value):
                total[r] = (0.0 if math.isnan(total[r]) else total[r]) + weight * z[r]
    mean, std = mean_std([t for t in total if not math.isnan(t)], 1)
    return [0.0 if math.isnan(t) else (t - mean) / (std + eps) for t in total]


def process(
    step_reward: Sequence[float],
    step_end: Sequence[int],
    sequence: Sequence[int],
    group_of_sequence: Sequence[int],
    lengths: Sequence[int],
    *,
    eps: float,
    ddof: int,
    gamma: float = 1.0,
) -> list[list[float]]:
    """DeepSeekMath 4.1.3 by its definition: for each token the sum over the steps that end at it or later."""
    z = advantages(
        step_reward,
        [group_of_sequence[s] for s in sequence],
        baseline="mean",
        scale="group",
        eps=eps,
        ddof=ddof,
        lengths=[],
        singleton="zero",
    )
    result = []
    for i, length in enumerate(lengths):
        steps = sorted((step_end[s], z[s]) for s in range(len(z)) if sequence[s] == i)
        ends = sorted({end for end, _ in steps})
        row = []
        for t in range(length):
            later = [(end, value) for end, value in steps if end >= t]
            power = {end: n for n, end in enumerate(e for e in ends if e >= t)}
            row.append(math.fsum(value * gamma ** power[end] for end, value in later))
        result.append(row)
    return result


def gae(
    reward: Sequence[float],
    value: Sequence[float],
    mask: Sequence[bool],
    gamma: float,
    lam: float,
    bootstrap: float,
) -> list[float]:
    """Backward loop over one sequence; masked tokens carry everything through."""
    result = [0.0] * len(reward)
    last, next_value = 0.0, bootstrap
    for t in reversed(range(len(reward))):
        if mask[t]:
            last = reward[t] + gamma * next_value - value[t] + gamma * lam * last
            next_value = value[t]
            result[t] = last
    return result

"""Group-relative advantages: eager forward and hand-written backward, in float64 whatever the dtype of the rewards.

A reward is a row of K columns. NaN means "not scored": a NaN column is left out of the row's sum, a row of NaN is left
out of its group. An infinite reward is a fault: it makes NaN of its own group and takes no part in batch statistics.

Everything is centred on the smallest reward of the set before it is summed, so equal rewards give exactly 0 and an
offset of 1e6 costs no digits. A set without spread (largest - smallest <= tie * largest magnitude) is *degenerate*.
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class Baseline(IntEnum):
    """What is subtracted from a reward."""

    MEAN = 0  # mean of the group
    LEAVE_ONE_OUT = 1  # mean of the group's other members
    LENGTH_WEIGHTED = 2  # mean of the group weighted by completion length
    SECOND_BEST = 3  # the runner-up, for the best of the group; everybody else gets 0
    BATCH = 4  # mean of the batch
    NONE = 5


class Scale(IntEnum):
    """What the difference is divided by."""

    GROUP = 0  # standard deviation of the group + eps
    BATCH = 1  # standard deviation of the batch + eps
    MEAN = 2  # mean of the group; 0 unless it is positive
    NONE = 3


class Combine(IntEnum):
    """How K reward columns become one score."""

    SUM = 0  # weighted sum
    NORMALIZE_THEN_SUM = 1  # weighted sum of group z-scores, divided by its batch std


class Singleton(IntEnum):
    """Advantage of a group with one scored member."""

    ZERO = 0
    RAW = 1  # the reward itself: group mean 0 and group standard deviation 1


# params = (eps, ddof, tie), a float64 CPU tensor. spec = [baseline, scale, combine, singleton].
# counts = rows with a non-zero advantage, rows left out, NaN cells, rows of groups with an infinite reward.
NUM_COUNTS = 4
# batch = number of rows, smallest score, mean of (score - smallest), standard deviation; zeros where not needed.
NUM_BATCH = 4


class _Groups:
    """Sums and extrema per group, spread back over the rows."""

    def __init__(
        self, rows: int, order: Tensor, offsets: Tensor, group_size: int, device: torch.device
    ) -> None:
        position = torch.arange(rows, device=device)
        if offsets.numel():
            of_position = torch.searchsorted(offsets, position, right=True) - 1
            self.of_row = torch.empty_like(position).scatter_(0, order, of_position)
            self.count = offsets.numel() - 1
        else:
            self.of_row = position // group_size
            self.count = rows // group_size

    def sum(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.count).index_add(0, self.of_row, x)[self.of_row]

    def min(self, x: Tensor) -> Tensor:
        start = x.new_full((self.count,), torch.inf)
        return start.scatter_reduce(0, self.of_row, x, "amin")[self.of_row]

    def max(self, x: Tensor) -> Tensor:
        return -self.min(-x)


class _Moments(NamedTuple):
    """Statistics of the group of each row, [B]."""

    n: Tensor
    low: Tensor
    high: Tensor
    mean: Tensor  # of x - low
    std: Tensor
    degenerate: Tensor
    centred: Tensor  # x - low - mean; 0 outside


def _moments(groups: _Groups, x: Tensor, member: Tensor, ddof: float, tie: float) -> _Moments:
    n = groups.sum(member.to(x.dtype))
    low = groups.min(torch.where(member, x, torch.inf))
    high = groups.max(torch.where(member, x, -torch.inf))
    mean = groups.sum(torch.where(member, x - low, 0.0)) / n
    centred = torch.where(member, x - low - mean, 0.0)
    variance = groups.sum(centred * centred) / (n - ddof)
    std = torch.where(n > ddof, variance, 0.0).sqrt()
    degenerate = ~(high - low > tie * torch.maximum(low.abs(), high.abs()))
    return _Moments(n, low, high, mean, std, degenerate, centred)


def _batch(score: Tensor, ddof: float) -> Tensor:  # [NUM_BATCH]
    member = score.isfinite()
    n = member.sum().to(score.dtype)
    low = torch.cat((torch.where(member, score, torch.inf), score.new_full((1,), torch.inf))).amin()
    mean = torch.where(member, score - low, 0.0).sum() / n
    centred = torch.where(member, score - low - mean, 0.0)
    std = torch.where(n > ddof, (centred * centred).sum() / (n - ddof), 0.0).sqrt()
    return torch.where(n > 0, torch.stack((n, low, mean, std)), 0.0)


def _combine(
    reward: Tensor,
    weight: Tensor,
    groups: _Groups,
    combine: int,
    eps: float,
    ddof: float,
    tie: float,
) -> Tensor:  # [B] score: NaN = left out, inf = member of a faulty group
    scored = ~reward.isnan()
    if combine == Combine.SUM:
        score = torch.where(scored, reward * weight, 0.0).sum(dim=1)
    else:
        score = reward.new_zeros(reward.shape[0])
        for column, live, w in zip(
            reward.unbind(1), scored.unbind(1), weight.unbind(), strict=True
        ):
            m = _moments(groups, column, live, ddof, tie)
            z = torch.where(m.degenerate, 0.0, m.centred / (m.std + eps))
            score = score + torch.where(live, w * z, 0.0)
    faulty = groups.max(reward.isinf().any(dim=1).to(reward.dtype)) > 0
    score = torch.where(faulty, torch.inf, score)
    return torch.where(scored.any(dim=1), score, torch.nan)


class _Rule(NamedTuple):
    """How one row is treated, [B]: the numerator before the division, the divisor, and where the result is fixed."""

    moments: _Moments
    member: Tensor
    fault: Tensor
    numerator: Tensor
    divisor: Tensor
    zero: Tensor
    raw: Tensor  # a singleton that keeps its reward
    best: Tensor  # SECOND_BEST: first row with the largest score, first other row with the second largest
    second: Tensor


def _first(groups: _Groups, chosen: Tensor, place: Tensor) -> Tensor:
    return chosen & (place == groups.min(torch.where(chosen, place, torch.inf)))


def _rule(
    score: Tensor,
    batch: Tensor,
    length: Tensor,
    order: Tensor,
    groups: _Groups,
    params: Tensor,
    spec: list[int],
) -> _Rule:
    baseline, scale, combine, singleton = spec
    eps, ddof, tie = params.tolist()
    if combine == Combine.NORMALIZE_THEN_SUM:  # the group has had its turn, column by column
        baseline, scale = Baseline.NONE, Scale.BATCH
    member = score.isfinite()
    m = _moments(groups, score, member, ddof, tie)
    best = second = torch.zeros_like(member)
    relative_baseline = baseline not in (Baseline.NONE, Baseline.BATCH)
    relative = relative_baseline or scale in (Scale.GROUP, Scale.MEAN)
    raw = (m.n == 1) & (relative and singleton == Singleton.RAW)
    if baseline == Baseline.MEAN:
        numerator = m.centred
    elif baseline == Baseline.LEAVE_ONE_OUT:
        numerator = m.centred * (m.n / (m.n - 1))
    elif baseline == Baseline.LENGTH_WEIGHTED:
        y = torch.where(member, score - m.low, 0.0)
        numerator = y - groups.sum(_length_share(length, member, groups) * y)
    elif baseline == Baseline.SECOND_BEST:
        place = torch.arange(score.numel(), device=score.device).to(score.dtype)
        if order.numel():
            place = torch.empty_like(place).scatter_(0, order, place)
        best = _first(groups, member & (score == m.high), place)
        others = torch.where(member & ~best, score, -torch.inf)
        runner_up = groups.max(others)
        second = _first(groups, others.isfinite() & (others == runner_up), place)
        numerator = torch.where(best, m.high - runner_up, 0.0)
    elif baseline == Baseline.BATCH:
        numerator = score - batch[1] - batch[2]
    else:
        numerator = score
    if relative_baseline:
        numerator = torch.where(raw, score, numerator)
    zero = m.degenerate & ~raw & relative
    divisor = torch.ones_like(score)
    if scale == Scale.GROUP:
        divisor = torch.where(raw, 1.0, m.std + eps)
    elif scale == Scale.MEAN:
        divisor = torch.where(raw, 1.0, m.low + m.mean)
    elif scale == Scale.BATCH:
        divisor = divisor * (batch[3] + eps)
        zero = zero | (batch[3] == 0)
    zero = zero | ~(divisor > 0) | ~member
    return _Rule(m, member, score.isinf(), numerator, divisor, zero, raw, best, second)


def _length_share(length: Tensor, member: Tensor, groups: _Groups) -> Tensor:
    """Each row's share of its group's total length; equal shares where the total is 0."""
    weight = torch.where(member, length, 0.0)
    total = groups.sum(weight)
    equal = member.to(weight.dtype) / groups.sum(member.to(weight.dtype))
    return torch.where(total > 0, weight / total, equal)


def group_advantage_fwd(
    reward: Tensor,  # [B, K] float32 or float64
    weight: Tensor,  # [K], or [0]: all 1
    length: Tensor,  # [B], or [0] unless LENGTH_WEIGHTED
    order: Tensor,  # [B] int64 rows sorted by group, or [0]: rows are in order
    offsets: Tensor,  # [M + 1] int64 ends of the groups in `order`, or [0]: groups of group_size
    params: Tensor,  # [3] float64 on the CPU
    group_size: int,
    spec: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return advantage, mean, std, is_degenerate, active_index [B], counts, and for backward score [B] and batch.

    mean and std are those of the row's group (NaN for an empty or faulty group).
    """
    groups = _Groups(reward.shape[0], order, offsets, group_size, reward.device)
    eps, ddof, tie = params.tolist()
    exact = reward.double()
    weight64 = weight.double() if weight.numel() else exact.new_ones(reward.shape[1])
    score = _combine(exact, weight64, groups, spec[2], eps, ddof, tie)
    needs_batch = spec[0] == Baseline.BATCH or spec[1] == Scale.BATCH or spec[2] != Combine.SUM
    batch = _batch(score, ddof) if needs_batch else score.new_zeros(NUM_BATCH)
    rule = _rule(score, batch, length.double(), order, groups, params, spec)
    advantage = torch.where(rule.zero, 0.0, rule.numerator / rule.divisor)
    advantage = torch.where(rule.fault, torch.nan, advantage).to(reward.dtype)
    faulty = groups.max(rule.fault.double()) > 0
    broken = (rule.moments.n == 0) | faulty
    mean = torch.where(broken, torch.nan, rule.moments.low + rule.moments.mean)
    std = torch.where(broken, torch.nan, rule.moments.std)
    active = advantage != 0
    num_active = active.sum()
    first = torch.argsort(~active, stable=True)
    place = torch.arange(first.numel(), device=first.device)
    counts = torch.stack((num_active, score.isnan().sum(), reward.isnan().sum(), rule.fault.sum()))
    return (
        advantage,
        mean.to(reward.dtype),
        std.to(reward.dtype),
        rule.moments.degenerate & ~faulty,
        torch.where(place < num_active, first, -1),
        counts,
        score,
        batch,
    )


def _standard_adjoint(
    groups: _Groups, m: _Moments, v: Tensor, std: Tensor, eps: float, ddof: float
) -> Tensor:
    """Return d sum(v * centred / (std + eps)) / dx for members of non-degenerate groups."""
    d = std + eps
    projection = groups.sum(v * m.centred) / d
    along = torch.where(std > 0, m.centred / ((m.n - ddof) * std), 0.0)
    return (v - groups.sum(v) / m.n - projection * along) / d


def group_advantage_bwd(
    dadvantage: Tensor,  # [B]
    advantage: Tensor,  # the outputs of the forward pass
    score: Tensor,
    batch: Tensor,
    reward: Tensor,
    weight: Tensor,
    length: Tensor,
    order: Tensor,
    offsets: Tensor,
    params: Tensor,
    group_size: int,
    spec: list[int],
) -> Tensor:  # [B, K]
    """Gradient with respect to the reward: exactly 0 in degenerate groups and where a reward is NaN."""
    groups = _Groups(reward.shape[0], order, offsets, group_size, reward.device)
    eps, ddof, tie = params.tolist()
    baseline, scale, combine, _ = spec
    exact = reward.double()
    weight64 = weight.double() if weight.numel() else exact.new_ones(reward.shape[1])
    rule = _rule(score, batch, length.double(), order, groups, params, spec)
    m = rule.moments
    frozen = rule.zero | rule.fault
    u = torch.where(frozen, 0.0, dadvantage.double())
    v = torch.where(frozen, 0.0, u / rule.divisor)
    ua = torch.where(frozen, 0.0, u * advantage.double())
    if combine == Combine.NORMALIZE_THEN_SUM:
        baseline, scale = Baseline.NONE, Scale.BATCH
    dscore = v
    if baseline == Baseline.MEAN:
        dscore = v - groups.sum(v) / m.n
    elif baseline == Baseline.LEAVE_ONE_OUT:
        dscore = (v - groups.sum(v) / m.n) * (m.n / (m.n - 1))
    elif baseline == Baseline.LENGTH_WEIGHTED:
        dscore = v - _length_share(length.double(), rule.member, groups) * groups.sum(v)
    elif baseline == Baseline.SECOND_BEST:
        given = groups.sum(torch.where(rule.best, v, 0.0))
        dscore = torch.where(rule.best, given, torch.where(rule.second, -given, 0.0))
    elif baseline == Baseline.BATCH:
        dscore = v - v.sum() / batch[0]
    dscore = torch.where(rule.raw, v, dscore)
    if scale == Scale.GROUP:
        slope = torch.where(m.std > 0, m.centred / ((m.n - ddof) * m.std), 0.0)
        dscore = dscore - torch.where(rule.raw, 0.0, groups.sum(ua) / rule.divisor * slope)
    elif scale == Scale.MEAN:
        dscore = dscore - torch.where(rule.raw, 0.0, groups.sum(ua) / rule.divisor / m.n)
    elif scale == Scale.BATCH:
        slope = (score - batch[1] - batch[2]) / ((batch[0] - ddof) * batch[3])
        dscore = dscore - ua.sum() / rule.divisor * slope
    dscore = torch.where(frozen, 0.0, dscore)
    return _spread(dscore, rule.fault, exact, weight64, groups, combine, eps, ddof, tie).to(
        reward.dtype
    )


def _spread(
    dscore: Tensor,
    fault: Tensor,
    reward: Tensor,
    weight: Tensor,
    groups: _Groups,
    combine: int,
    eps: float,
    ddof: float,
    tie: float,
) -> Tensor:
    """Carry the gradient of the scores to the reward columns."""
    columns = []
    for column, w in zip(reward.unbind(1), weight.unbind(), strict=True):
        live = ~column.isnan()
        dcolumn = w * dscore
        if combine == Combine.NORMALIZE_THEN_SUM:
            m = _moments(groups, column, live, ddof, tie)
            dz = torch.where(live, dcolumn, 0.0)
            dcolumn = torch.where(
                m.degenerate, 0.0, _standard_adjoint(groups, m, dz, m.std, eps, ddof)
            )
        dcolumn = torch.where(live, dcolumn, 0.0)
        columns.append(torch.where(live & fault, torch.nan, dcolumn))
    return torch.stack(columns, dim=1)

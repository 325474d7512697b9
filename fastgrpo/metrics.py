"""Metrics of a loss: device-side sums, counts, minima and maxima that merge exactly over micro-batches and ranks."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.spec import METRICS

# What each row of the metrics holds, per live token; see `fastgrpo.spec.METRICS` and `rollout_correction`.
DEFINITIONS = {
    "policy_loss": "policy term after token weights and gates",
    "kl": "KL estimate after clamps and ratio weight, before beta; 0 without a target",
    "ratio": "exp of the clamped, pooled log-ratio, before the bounds",
    "coefficient": "gain as applied: -d policy term / d log-prob / advantage; 0 where clipped or gated",
    "log_ratio": "log-prob - old log-prob before any clamp",
    "clip_low": "1 where advantage < 0 and ratio < its lower bound",
    "clip_high": "1 where advantage > 0 and ratio > its upper bound",
    "clip_region": "1 where either holds",
    "clip_dual": "1 where advantage < 0 and ratio > its upper bound (dual clip)",
    "gate_closed": "1 where a gate removed the token",
    "clamp_log_ratio": "1 where the clamp of the log-ratio acted",
    "clamp_kl": "1 where a clamp of the KL term acted",
    "entropy": "entropy of the policy; 0 if none is given",
    "logprob": "log-prob of the sampled token",
    "fault": "1 where log-prob, old, reference or token loss is not finite",
    "active": "1 where the gradient of the token is not exactly 0",
    "rollout_weight": "importance weight as applied; 1 without a correction and where the sampler gave NaN",
    "rollout_weight_squared": "its square",
    "rollout_abs_log_ratio": "|old - rollout|, without tokens the sampler gave NaN for (nor in those below)",
    "rollout_k1": "rollout - old: estimates KL(rollout || old)",
    "rollout_k3": "the same by k3",
    "rollout_chi2": "exp(2 (old - rollout)) - 1: estimates the chi-square divergence",
    "rollout_outside": "1 where the weight lay outside its limits or a gate between old and rollout closed",
}


class Alias(NamedTuple):
    """Another project's name for a statistic of a row."""

    row: str
    statistic: str  # mean, min, max, negative (-mean), std, ess = mean^2 / mean of squares
    definition: str = ""  # where the other project's differs


TOKENS = "over tokens; TRL counts sequences at sequence level"
# Names that users of TRL and verl already plot.
ALIASES = {
    "clip_ratio/low_mean": Alias("clip_low", "mean", TOKENS),
    "clip_ratio/high_mean": Alias("clip_high", "mean", TOKENS),
    "clip_ratio/region_mean": Alias("clip_region", "mean", TOKENS),
    "cispo_clip_ratio": Alias("clip_high", "mean", TOKENS),
    "sampling/sampling_logp_difference/mean": Alias("rollout_abs_log_ratio", "mean"),
    "sampling/sampling_logp_difference/max": Alias("rollout_abs_log_ratio", "max"),
    "sampling/importance_sampling_ratio/min": Alias("rollout_weight", "min"),
    "sampling/importance_sampling_ratio/mean": Alias("rollout_weight", "mean", TOKENS),
    "sampling/importance_sampling_ratio/max": Alias("rollout_weight", "max"),
    "actor/pg_clipfrac": Alias("clip_region", "mean"),
    "actor/pg_clipfrac_lower": Alias("clip_dual", "mean"),
    "actor/ppo_kl": Alias("log_ratio", "negative", "before the clamp that verl applies"),
    "actor/kl_loss": Alias("kl", "mean", "the mean over tokens whatever loss_agg_mode is"),
    "actor/entropy": Alias("entropy", "mean", "the mean over tokens whatever loss_agg_mode is"),
    "rollout_corr/rollout_is_mean": Alias("rollout_weight", "mean"),
    "rollout_corr/rollout_is_min": Alias(
        "rollout_weight", "min", "verl: before truncation at sequence level"
    ),
    "rollout_corr/rollout_is_max": Alias(
        "rollout_weight", "max", "verl: before truncation at sequence level"
    ),
    "rollout_corr/rollout_is_std": Alias("rollout_weight", "std"),
    "rollout_corr/rollout_is_eff_sample_size": Alias("rollout_weight", "ess"),
    "rollout_corr/kl": Alias("rollout_k1", "mean"),
    "rollout_corr/k3_kl": Alias("rollout_k3", "mean"),
    "rollout_corr/rollout_rs_masked_fraction": Alias(
        "rollout_outside", "mean", "truncated tokens count too"
    ),
    "rollout_corr/chi2_token": Alias("rollout_chi2", "mean"),
}


class Metrics(Mapping[str, Tensor]):
    """Mapping from a metric's name to its mean over live tokens, a 0-dim tensor on the device (no sync).

    `sum`, `min`, `max` and `count` give the other statistics. `data` is one [K, 4] tensor, `names` its rows.
    """

    def __init__(self, data: Tensor, names: tuple[str, ...] = METRICS) -> None:
        """Wrap a [K, 4] tensor of (sum, count, min, max)."""
        self.data = data.detach()
        self.names = names

    def _row(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(
                f"unknown metric {name!r}; known: {', '.join([*self.names, *self.aliases()])}"
            )
        return self.data[self.names.index(name)]

    def aliases(self) -> list[str]:
        """TRL's and verl's names that this object answers to."""
        return [name for name, alias in ALIASES.items() if alias.row in self.names]

    def __getitem__(self, name: str) -> Tensor:
        """Mean of a metric (0 without live tokens), or the statistic that an alias names."""
        if name in ALIASES:
            return self._statistic(ALIASES[name])
        total, count = self._row(name)[:2]
        return total / count.clamp(min=1)

    def _statistic(self, alias: Alias) -> Tensor:
        if alias.statistic in ("min", "max"):
            return self.min(alias.row) if alias.statistic == "min" else self.max(alias.row)
        mean = self[alias.row]
        if alias.statistic == "negative":
            return -mean
        if alias.statistic == "mean":
            return mean
        square = self[f"{alias.row}_squared"]
        if alias.statistic == "ess":  # share of the tokens that count under unequal weights
            return mean**2 / square
        return (square - mean**2).clamp(min=0).sqrt()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the rows."""
        return iter(self.names)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.names)

    def sum(self, name: str) -> Tensor:
        """Sum over live tokens."""
        return self._row(name)[0]

    def count(self, name: str = "policy_loss") -> Tensor:
        """Number of live tokens."""
        return self._row(name)[1]

    def min(self, name: str) -> Tensor:
        """Minimum over live tokens; +inf without any."""
        return self._row(name)[2]

    def max(self, name: str) -> Tensor:
        """Maximum over live tokens; -inf without any."""
        return self._row(name)[3]

    def merge(self, other: "Metrics") -> "Metrics":
        """Metrics of both batches together, exactly (unlike a mean of means)."""
        if not isinstance(other, Metrics):
            raise TypeError(f"other must be Metrics, got {type(other).__name__} {other!r}")
        if self.names != other.names:
            raise ValueError(
                f"other must have the same rows as these metrics, {self.names}, got {other.names}"
            )
        total = self.data[:, :2] + other.data[:, :2]
        low = torch.minimum(self.data[:, 2], other.data[:, 2])
        high = torch.maximum(self.data[:, 3], other.data[:, 3])
        return Metrics(torch.cat([total, low[:, None], high[:, None]], dim=1), self.names)

    def all_reduce(self, group: "dist.ProcessGroup | None" = None) -> "Metrics":
        """Metrics over all ranks of `group`: one sum and one maximum (a minimum is a negated maximum)."""
        total = self.data[:, :2].contiguous()
        extremes = torch.stack([-self.data[:, 2], self.data[:, 3]], dim=1)
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group)
        low_high = torch.stack([-extremes[:, 0], extremes[:, 1]], dim=1)
        return Metrics(torch.cat([total, low_high], dim=1), self.names)

    def to_dict(self) -> dict[str, float]:
        """Means as Python floats, TRL's and verl's names included (one device sync)."""
        host = Metrics(self.data.cpu(), self.names)
        return {name: float(host[name]) for name in [*self.names, *host.aliases()]}

    def __repr__(self) -> str:
        """Show the rows without reading the device."""
        return f"Metrics({', '.join(self.names)})"

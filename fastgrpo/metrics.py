"""Metrics of a loss: device-side sums, counts, minima and maxima that merge exactly over micro-batches and ranks."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.spec import METRICS

# Names that users of TRL and verl already plot -> (row, statistic).
ALIASES = {
    "clip_ratio/low_mean": ("clip_low", "mean"),
    "clip_ratio/high_mean": ("clip_high", "mean"),
    "clip_ratio/region_mean": ("clip_region", "mean"),
    "sampling/sampling_logp_difference/mean": ("rollout_abs_log_ratio", "mean"),
    "sampling/sampling_logp_difference/max": ("rollout_abs_log_ratio", "max"),
    "sampling/importance_sampling_ratio/min": ("rollout_weight", "min"),
    "sampling/importance_sampling_ratio/mean": ("rollout_weight", "mean"),
    "sampling/importance_sampling_ratio/max": ("rollout_weight", "max"),
    "actor/pg_clipfrac": ("clip_region", "mean"),
    "actor/pg_clipfrac_lower": ("clip_dual", "mean"),
    "actor/kl_loss": ("kl", "mean"),
    "actor/entropy": ("entropy", "mean"),
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
        extra = ["actor/ppo_kl"] + (
            ["rollout/ess", "rollout/chi2"] if "rollout_weight" in self.names else []
        )
        return [alias for alias, (row, _) in ALIASES.items() if row in self.names] + extra

    def __getitem__(self, name: str) -> Tensor:
        """Mean of a metric (0 without live tokens), or the statistic that an alias names."""
        if name == "actor/ppo_kl":
            return -self["log_ratio"]
        if name == "rollout/ess":  # effective share of the tokens under their importance weights
            return self["rollout_weight"] ** 2 / self["rollout_weight_squared"]
        if name == "rollout/chi2":
            return self["rollout_weight_squared"] - 1.0
        if name in ALIASES:
            row, statistic = ALIASES[name]
            return self[row] if statistic == "mean" else getattr(self, statistic)(row)
        total, count = self._row(name)[:2]
        return total / count.clamp(min=1)

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

"""The numbers of one step, under the names that TRL's dashboards plot."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fastgrpo.advantages import GroupAdvantage
from fastgrpo.losses import PolicyLoss
from fastgrpo.metrics import Metrics
from fastgrpo.rollout_correction import ROLLOUT_METRICS
from fastgrpo.spec import METRICS
from fastgrpo.trainer.microbatch import MicroBatch
from fastgrpo.trainer.parallel.distributed import Ranks
from fastgrpo.trainer.rewards.scoring import Rewards


class Tally:
    """Adds up what the micro-batches of a step report; nothing is read from the device before `losses`."""

    def __init__(self) -> None:
        self.metrics: Metrics | None = None
        self.updates = 0
        self.loss: Tensor | float = 0.0  # sum over updates
        self.value: Tensor | None = None  # PPO's value loss and clipped share, sums over updates
        self.gaps: list[Tensor] = []

    def merge(self, other: "Tally") -> None:
        """Takes in all that another tally has."""
        if other.metrics is not None:
            mine = self.metrics
            self.metrics = other.metrics if mine is None else mine.merge(other.metrics)
        self.updates += other.updates
        self.loss = self.loss + other.loss
        if other.value is not None:
            self.add_value(other.value)
        self.gaps += other.gaps

    def state(self) -> dict[str, Any]:
        """All of it, for a checkpoint."""
        m = self.metrics
        return {
            "metrics": None if m is None else (m.data, m.names),
            "updates": self.updates,
            "loss": self.loss,
            "value": self.value,
            "gaps": self.gaps,
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Tally":
        """The inverse of `state`."""
        tally = cls()
        if state["metrics"] is not None:
            tally.metrics = Metrics(*state["metrics"])
        for name in ("updates", "loss", "value", "gaps"):
            setattr(tally, name, state[name])
        return tally

    def over_ranks(self, ranks: Ranks) -> "Tally":
        """The tally of all ranks together; the loss of each is divided by D / world_size."""
        own = () if self.metrics is None else self.metrics.names
        names = (*METRICS, *ROLLOUT_METRICS)[: ranks.maxima([len(own)])[0]]
        if ranks.world_size == 1 or not names:
            return self
        whole = Tally()
        data = torch.zeros(len(names), 4, dtype=torch.float64)
        data[:, 2:] = torch.tensor([torch.inf, -torch.inf])
        mine = Metrics(data, names) if self.metrics is None else self.metrics
        whole.metrics = Metrics(mine.data.cpu(), mine.names).all_reduce()
        loss = torch.as_tensor(self.loss, dtype=torch.float64)
        whole.updates, whole.loss = self.updates, ranks.sum(loss) / ranks.world_size
        if self.value is not None:
            whole.value = ranks.sum(self.value) / ranks.world_size
        gap = torch.cat(self.gaps).cpu() if self.gaps else torch.zeros(0)
        sizes = [told["n"] for told in ranks.share({"n": len(gap)})]
        if max(sizes):
            whole.gaps = [ranks.rows(gap, sizes)]
        return whole

    def add(self, result: PolicyLoss, batch: MicroBatch) -> None:
        """Takes in one micro-batch; compares the log-probabilities of the policy that sampled with the sampler's."""
        self.metrics = (
            result.metrics if self.metrics is None else self.metrics.merge(result.metrics)
        )
        self.loss = self.loss + result.loss.detach()
        old = result.logprob if batch.old_logprob is None else batch.old_logprob
        if batch.rollout_logprob is not None:
            assert old is not None
            self.gaps.append((old - batch.rollout_logprob).abs())

    def add_value(self, value: Tensor) -> None:
        """Takes in what a micro-batch's value loss reports."""
        self.value = value if self.value is None else self.value + value

    def losses(self, *, with_kl: bool) -> dict[str, float]:
        """Loss, KL (if there is a reference), entropy, clipping: what the loss itself measured."""
        if self.metrics is None:  # every completion was left out
            return {"loss": 0.0}
        m = Metrics(self.metrics.data.cpu(), self.metrics.names)
        numbers = {
            "loss": self.loss / self.updates,
            "entropy": m["entropy"],
            "clip_ratio/low_mean": m["clip_low"],
            "clip_ratio/high_mean": m["clip_high"],
            "clip_ratio/region_mean": m["clip_region"],
            "fault": m.sum("fault"),
        }
        if with_kl:
            numbers |= {"kl": m["kl"], "kl/max": m.max("kl")}
        if self.value is not None:
            loss, clipped = self.value / self.updates
            numbers |= {"loss/value_avg": loss, "val/clipfrac_avg": clipped}
        if self.gaps:
            gap = torch.cat(self.gaps)
            gap = gap[~gap.isnan()]  # tokens that the sampler could not score
            numbers["sampling/sampling_logp_difference/mean"] = gap.mean()
            numbers["sampling/sampling_logp_difference/max"] = gap.max()
        if "rollout_weight" in m.names:
            for name in ("min", "mean", "max"):
                weight = f"sampling/importance_sampling_ratio/{name}"
                numbers[weight] = m[weight]
        return {name: float(value) for name, value in numbers.items()}


def reward_numbers(
    rewards: Rewards,
    reward: Tensor,  # [B, K]
    advantage: GroupAdvantage,
    group_size: int,
) -> dict[str, float]:
    """Rewards and their spread within groups."""
    total = rewards.total(reward).nan_to_num(0.0).view(-1, group_size)
    flat = advantage.is_degenerate.view(-1, group_size)[:, 0]
    best, worst = total.max(), total.min()
    numbers = {
        "reward": total.mean(),
        "reward_std": advantage.std.view(-1, group_size)[:, 0].nanmean(),
        "frac_reward_zero_std": flat.float().mean(),
        "frac_groups_all_best": (flat & (total[:, 0] == best) & (best > 0)).float().mean(),
        "frac_groups_all_worst": (flat & (total[:, 0] == worst) & (worst <= 0)).float().mean(),
    }
    for name, column in zip(rewards.functions, reward.T, strict=True):
        scored = column[~column.isnan()]
        numbers[f"rewards/{name}/mean"] = scored.mean()
        numbers[f"rewards/{name}/std"] = scored.std() if len(scored) > 1 else scored.new_zeros(())
    return {name: float(value) for name, value in numbers.items()} | rewards.fault_numbers()


def length_numbers(lengths: Sequence[int], truncated: Sequence[bool]) -> dict[str, float]:
    """Lengths of completions, and the share that was cut at the maximum."""
    ended = [n for n, cut in zip(lengths, truncated, strict=True) if not cut]
    return {
        "completions/mean_length": fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - len(ended) / len(lengths),
        "completions/mean_terminated_length": fmean(ended) if ended else 0.0,
    }

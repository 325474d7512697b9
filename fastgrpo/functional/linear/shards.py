"""Log-probs from a vocabulary that is split over the ranks of a group: what each shard knows, and how it adds up.

A token of another shard is scored as column 0 here: its log-prob is ignored, and the gradient of that column, which the
op treats as the target's, is written anew.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastgrpo.functional.linear.gradients import Rows
from fastgrpo.functional.linear.score import Scored, Scoring, Upstream
from fastgrpo.functional.linear.statistics import scaled_logits

FAR = (
    -1e30
)  # a log-prob whose probability is 0, but finite: -inf would mean that the token is impossible


class Shard(NamedTuple):
    """This rank's part of the vocabulary: columns [start, start + size)."""

    start: int
    size: int

    def owns(self, token_ids: Tensor) -> Tensor:
        """Whether this shard holds each token's column."""
        return (token_ids >= self.start) & (token_ids < self.start + self.size)

    def local(self, token_ids: Tensor) -> Tensor:
        """Column of each token in this shard, 0 where another one holds it."""
        return torch.where(self.owns(token_ids), token_ids - self.start, 0)


@dataclass(frozen=True)
class ShardScoring(Scoring):
    """Scoring of a shard's columns; `token_ids` are columns of the shard, valid where it owns the token."""

    owned: Tensor  # [N] bool

    def gradient(self, logits: Tensor, rows: Rows, scored: Scored, upstream: Upstream) -> None:
        """Gradient of this shard's columns; `scored` is of the whole vocabulary.

        Where another shard owns the token, the op is given the log-prob of column 0 over the whole vocabulary.
        """
        owned, slope = rows.selection.take(self.owned), self._slope(rows)
        x = scaled_logits(logits[:, :1], self.temperature_of(rows.selection), self.logit_params)[
            :, 0
        ]
        log_p = torch.nan_to_num(x - scored.lse * slope, nan=torch.nan, neginf=FAR)
        log_p = torch.where(scored.logprob.isnan(), torch.nan, log_p)
        dlogprob = upstream.dlogprob if upstream.dlogprob.numel() else torch.zeros_like(log_p)
        dlogprob = torch.where(scored.logprob == -torch.inf, 0.0, dlogprob)
        upstream = Upstream(dlogprob, upstream.dentropy)
        logprob = torch.where(owned, scored.logprob, log_p)
        super().gradient(logits, rows, scored._replace(logprob=logprob), upstream)
        value = self._column_gradient(x, log_p, slope, scored, upstream)
        logits[:, 0] = torch.where(owned, logits[:, 0], value.to(logits.dtype))

    def _slope(self, rows: Rows) -> Tensor:
        """dx / du: 1 / temperature, times the scale where there is no softcap."""
        slope = 1.0 / self.temperature_of(rows.selection)
        return slope * self.logit_params if self.logit_params.numel() == 1 else slope

    def _column_gradient(
        self, x: Tensor, log_p: Tensor, slope: Tensor, scored: Scored, upstream: Upstream
    ) -> Tensor:
        """Gradient [n] of a logit that is not the token's: -dlogprob p - dentropy p (log p + entropy), through x."""
        if self.logit_params.numel() == 2:
            scale, softcap = self.logit_params
            slope = slope * scale * (1 - (x / slope / softcap) ** 2)
        p = torch.exp(log_p)
        gradient = -upstream.dlogprob * p
        if upstream.dentropy.numel():
            gradient = gradient - upstream.dentropy * p * (log_p + scored.entropy)
        active = upstream.active()
        return torch.where(active, torch.where(p == 0, 0.0, gradient * slope), 0.0)


class DeadRows:
    """Remembers the rows whose columns are all -inf in this shard (a bias of -inf): legal here, a fault for the op."""

    def __init__(self, total: int, device: torch.device) -> None:
        """No row is dead before it is seen."""
        self.dead = torch.zeros(total, dtype=torch.bool, device=device)

    def __call__(self, logits: Tensor, rows: Rows, _: Tensor) -> None:
        """Look at a chunk."""
        rows.selection.put_into(self.dead, logits.amax(1) == -torch.inf)

    def settle(self, scored: Scored) -> Scored:
        """Statistics with a sum of exactly 0 in dead rows."""
        logprob, entropy, lse = scored
        entropy = entropy.where(~self.dead, 0.0) if entropy.numel() else entropy
        return Scored(
            logprob.where(~self.dead, -torch.inf), entropy, lse.where(~self.dead, -torch.inf)
        )


def log_odds_against(logprob: Tensor) -> Tensor:
    """log((1 - p) / p) from log p; exact for p next to 1, where 1 - p would be lost, and for tiny p."""
    return torch.log(-torch.expm1(logprob)) - logprob


def combine(parts: Tensor, slope: Tensor) -> Scored:
    """Statistics over the whole vocabulary from [shards, 4, n] = (lse, log-prob, entropy, owns the token) of each.

    `lse` is in units of logits; `slope` (scale / temperature) turns its differences into log-probabilities. The token's
    own shard gives the odds of its other columns against the token, the other shards add theirs.
    """
    lse, logprob, entropy, owner = parts.unbind(1)
    own = owner != 0
    top = lse.amax(0)
    relative = (lse - top) * slope
    total = torch.logsumexp(relative, 0)
    share = relative - total  # log-probability of each shard
    own_share = torch.where(own, share, 0.0).sum(0)
    own_logprob = torch.where(own, logprob, 0.0).sum(0)
    odds = torch.where(own, -torch.inf, share - own_share - own_logprob)
    odds = torch.logsumexp(torch.cat([odds, log_odds_against(own_logprob)[None]]), 0)
    whole = -(odds.clamp(min=0) + torch.log1p(torch.exp(-odds.abs())))
    whole = torch.where(own_logprob == -torch.inf, -torch.inf, whole)
    weight = torch.exp(share)
    mixed = torch.where(weight > 0, weight * (entropy - share), 0.0).sum(0)
    known = own.any(0) & ~lse.isnan().any(0)
    return Scored(
        *(torch.where(known, value, torch.nan) for value in (whole, mixed, top + total / slope))
    )


def gather(scored: Scored, owns: Tensor, group: "dist.ProcessGroup | None") -> Tensor:
    """Exchange four numbers per row: [shards, 4, n], in the order of the ranks."""
    entropy = scored.entropy if scored.entropy.numel() else torch.zeros_like(scored.logprob)
    mine = torch.stack([scored.lse, scored.logprob, entropy, owns.to(scored.logprob.dtype)])
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group)
    return torch.stack(parts)

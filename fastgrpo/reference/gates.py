"""Token selection, per-sequence sums and gates: the parts of the policy loss that see a whole sequence."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo.reference.log_ratio import log_ratio_of
from fastgrpo.spec import Between, Pool, Stat, When


class Tokens(NamedTuple):
    """The tokens of a batch after selection: a masked slot holds 0 everywhere."""

    logprob: Tensor  # [N]
    advantage: Tensor  # [N]
    live: Tensor  # [N] bool
    old: Tensor  # [N]; the log-prob itself where no old policy is given
    rollout: Tensor  # [N]; the log-prob itself where a rollout log-prob is absent or NaN
    entropy: Tensor  # [N]; 0 where not given
    sequence: Tensor  # [N] index of the token's sequence
    num_sequences: int

    @classmethod
    def select(
        cls, logprob: Tensor, advantage: Tensor, mask: Tensor, old: Tensor, rollout: Tensor, entropy: Tensor,
        cu_seqlens: Tensor,
    ) -> "Tokens":  # fmt: skip
        """Replace every masked slot by 0 before anything is computed."""
        zero = torch.zeros_like(logprob)
        logprob = torch.where(mask, logprob, zero)
        old = torch.where(mask, old, zero) if old.numel() else logprob
        rollout = (
            torch.where(mask & ~rollout.isnan(), rollout, logprob) if rollout.numel() else logprob
        )
        entropy = torch.where(mask, entropy, zero) if entropy.numel() else zero
        position = torch.arange(logprob.numel(), device=logprob.device, dtype=cu_seqlens.dtype)
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
        advantage = torch.where(mask, advantage, zero)
        return cls(
            logprob, advantage, mask, old, rollout, entropy, sequence, cu_seqlens.numel() - 1
        )

    def sequence_sum(self, value: Tensor) -> Tensor:
        """Sum over the live tokens of each sequence, given back to each of its tokens."""
        total = value.new_zeros(self.num_sequences)
        total = total.index_add(0, self.sequence, torch.where(self.live, value, 0.0))
        return total[self.sequence]

    def total(self, value: Tensor) -> Tensor:
        """Sum of [..., N] over live tokens, sequence by sequence: the same bits for padded and packed batches."""
        per_sequence = value.new_zeros(*value.shape[:-1], self.num_sequences)
        live_value = torch.where(self.live, value, 0.0)
        return per_sequence.index_add(-1, self.sequence, live_value).sum(-1)

    def sequence_length(self) -> Tensor:
        """Number of live tokens of each token's sequence, at least 1."""
        return self.sequence_sum(torch.ones_like(self.logprob)).clamp(min=1)

    def sequence_max(self, value: Tensor) -> Tensor:
        """Maximum over the live tokens of each sequence."""
        top = value.new_full((self.num_sequences,), -torch.inf)
        live_value = torch.where(self.live, value, -torch.inf)
        return top.scatter_reduce(0, self.sequence, live_value, "amax")[self.sequence]


def gate_statistic(tokens: Tokens, stat: int, other: Tensor, d_clamp: Tensor) -> Tensor:
    """Statistic of (policy, other) at each token; see `fastgrpo.spec.Stat`."""
    u = torch.clamp(log_ratio_of(tokens.logprob, other), -d_clamp, d_clamp)
    if stat == Stat.RATIO:
        return torch.exp(u)
    if stat == Stat.K1:
        return u
    if stat == Stat.K2:
        return 0.5 * u * u
    if stat == Stat.K3:
        return torch.expm1(u) - u
    if stat == Stat.ENTROPY:
        return tokens.entropy
    p, q = torch.exp(tokens.logprob), torch.exp(other)
    if stat == Stat.TV:
        return p - q
    not_p, not_q = (torch.clamp(-torch.expm1(x), min=1e-7) for x in (tokens.logprob, other))
    return torch.sign(p - q) * (-q * u + not_q * torch.log(not_q / not_p))


def gate_closed(
    tokens: Tokens, code: list[int], low: Tensor, high: Tensor, d_clamp: Tensor
) -> Tensor:
    """Where a gate (stat, between, pool, when, scope) removes the token; bounds are inclusive."""
    stat, between, pool, when, _ = code
    other = tokens.old if between == Between.THETA_OLD else tokens.rollout
    value = gate_statistic(tokens, stat, other, d_clamp)
    if pool == Pool.SEQ_SUM:
        value = tokens.sequence_sum(value)
    elif pool == Pool.SEQ_MEAN:
        value = tokens.sequence_sum(value) / tokens.sequence_length()
    elif pool == Pool.SEQ_MAX:
        value = tokens.sequence_max(value)
    shut = (value < low) | (value > high)
    if when == When.POSITIVE:
        shut = shut & (tokens.advantage > 0)
    elif when == When.NEGATIVE:
        shut = shut & (tokens.advantage < 0)
    return shut & tokens.live

"""PPO, the paper's baseline: advantages of tokens from a value model instead of groups.

Every token is rewarded with -beta * (log pi - log pi_ref), the last one with the completion's reward as well (Eq. 2).
What a token earned beyond the values, by generalised advantage estimation, is its advantage A_t in Eq. 1.

Source: DeepSeekMath, section 4.1.1 (Shao et al. 2024, arXiv:2402.03300).
"""

import torch
from torch import Tensor

from fastgrpo.advantages import gae, kl_in_reward, value_loss, whiten
from fastgrpo.trainer.microbatch import MicroBatch, Portion
from fastgrpo.trainer.state import State


@torch.no_grad()
def appraise(state: State, portions: list[Portion]) -> dict[str, float]:
    """Puts the advantages of tokens in place of the rewards that stand in `advantage`; returns what it found.

    Values and returns are kept for the value model's update. A completion that was cut at the maximum length is worth
    nothing after its last token: nothing follows. One without a reward (NaN) trains neither network. Every rank has to
    call this.
    """
    config, ranks = state.run.config, state.run.ranks
    real = [batch for portion in portions for batch in portion.batches if batch.counts]
    columns = list[Tensor]()
    for batch in (batch for portion in portions for batch in portion.batches):
        facts = _appraise(state, batch)
        if batch.counts:
            columns.append(facts)
    mine = torch.cat(columns, 1).T.cpu()
    counts = [told["tokens"] for told in ranks.share({"tokens": len(mine)})]
    everyone = ranks.rows(mine, counts)
    advantage, _, _, _, _, scored = everyone.T
    if config.scale_rewards != "none":
        advantage = whiten(advantage, scored.bool())
    begin = sum(counts[: ranks.rank])
    parts = advantage[begin : begin + len(mine)].split([batch.num_tokens for batch in real])
    for batch, part in zip(real, parts, strict=True):
        batch.advantage = part.to(state.run.device)
    return _numbers(everyone, sum(state.counts), config.beta)


def _appraise(state: State, batch: MicroBatch) -> Tensor:  # [6, N]
    """Fills in a micro-batch; returns advantage, reward, KL, value, returns of its tokens, and which have a reward."""
    run, config, tokens = state.run, state.run.config, batch.tokens
    assert state.critic is not None
    value = state.critic(tokens)
    live = torch.ones_like(value, dtype=torch.bool)
    policy = reference = torch.zeros_like(value)
    if batch.ref_logprob is not None:
        policy = run.policy(tokens) if batch.old_logprob is None else batch.old_logprob
        reference = batch.ref_logprob
    scored = ~batch.advantage.isnan()
    reward = kl_in_reward(
        batch.advantage.nan_to_num(0.0),
        policy,
        reference,
        live,
        beta=config.beta,
        cu_seqlens=tokens.cu_seqlens,
    )
    found = gae(
        reward, value, live, gamma=config.gamma, lam=config.lam, cu_seqlens=tokens.cu_seqlens
    )
    if len(scored) != len(live):
        scored = scored.repeat_interleave(tokens.cu_seqlens.diff())
    batch.advantage = found.advantage.where(scored, 0.0)
    batch.value = value
    batch.returns = found.returns.where(scored, value)
    facts = (batch.advantage, reward, policy - reference, value, batch.returns, scored)
    return torch.stack([row.float() for row in facts])


def _numbers(facts: Tensor, completions: int, beta: float) -> dict[str, float]:
    """What rewards and values were, all ranks together."""
    _, reward, kl, value, returns, _ = facts.double().T
    kl_per_completion = float(kl.sum()) / completions
    spread = float(returns.var())
    return {
        "objective/kl": kl_per_completion,
        "objective/non_score_reward": -beta * kl_per_completion,
        "objective/rlhf_reward": float(reward.sum()) / completions,
        "value/mean": float(value.mean()),
        "value/explained_variance": 1 - float((returns - value).var()) / spread if spread else 0.0,
    }


def value_backward(state: State, batch: MicroBatch, normalizer: float, last: bool) -> Tensor:  # [2]
    """Adds the gradient of vf_coef * value loss; returns this micro-batch's part of the loss and of the clipped share.

    Args:
        state: Has the value model.
        batch: Went through `appraise`.
        normalizer: Tokens that the losses are summed over, all ranks included, divided by the number of ranks.
        last: Whether it is the update's last micro-batch.
    """
    config, counts = state.run.config, float(batch.counts)
    assert state.value_model is not None
    assert batch.returns is not None
    with state.run.ranks.quiet(state.value_model, last):
        value = state.value_model(batch.tokens)
        fit = value_loss(
            value,
            batch.returns,
            torch.ones_like(value, dtype=torch.bool),
            old_value=None if config.cliprange_value is None else batch.value,
            clip=config.cliprange_value,
            normalizer=normalizer,
        )
        (fit.loss * (config.vf_coef * counts)).backward()
    share = fit.clip_fraction * batch.num_tokens / normalizer
    return torch.stack([fit.loss.detach(), share]) * counts

"""OpenRLHF 0.11: its log-probs and its policy loss.

    import fastgrpo.integrations.openrlhf as fast; fast.enable()    # in every actor process, first of all

`log_probs_from_logits` keeps confident tokens exact and makes no second copy of the logits; `PolicyLoss` takes
OpenRLHF's own arguments. A correction that compares the mean of |p - q| or of the binary KL over a sequence raises.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.choices import Correction, Gate, Reduce
from fastgrpo.functional.token_logprob import token_logprob
from fastgrpo.integrations.swap import Swap
from fastgrpo.losses import policy_loss
from fastgrpo.objective import Objective

Outputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of the labels; unlike OpenRLHF's own, the logits are left as they are."""
    return token_logprob(logits, labels, temperature=temperature).logprob


class PolicyLoss(nn.Module):
    """OpenRLHF's `PolicyLoss` (ppo or gspo, dual clip, rollout correction) on fastgrpo's loss."""

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Any = (0.5, 5.0),
    ) -> None:
        """Build the objective; raises on a combination that is not covered."""
        super().__init__()
        if policy_loss_type not in ("ppo", "gspo"):
            raise ValueError(f"policy_loss_type must be ppo or gspo, got {policy_loss_type!r}")
        clip = Objective.grpo(epsilon=clip_eps_low, epsilon_high=clip_eps_high)
        gspo, cap = policy_loss_type == "gspo", math.inf if dual_clip is None else dual_clip
        by_token = token_level_loss and not gspo
        self.objective = Objective(
            name=f"openrlhf-{policy_loss_type}",
            level="seq_mean" if gspo else "token",
            d_clamp=None if gspo else 20.0,
            positive=clip.positive,
            negative=(clip.negative[0], cap),
            reduce=Reduce(per="token") if by_token else Reduce(count_empty=False),
            **_correction(
                is_correction_level,
                is_correction_mode,
                is_correction_gating,
                is_correction_threshold,
                gspo,
            ),
        )
        self.by_token = by_token

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Outputs:
        """Return loss, clip ratio, PPO KL, rollout KL and the share of filtered tokens (None without a correction)."""
        total = batch_num_tokens if self.by_token else global_batch_size
        uses_rollout = self.objective.correction is not None or bool(self.objective.gates)
        result = policy_loss(
            log_probs,
            advantages,
            action_mask.bool(),
            old_logprob=old_log_probs,
            rollout_logprob=rollout_log_probs if uses_rollout else None,
            objective=self.objective,
            normalizer=None if total is None else float(total) / dp_size,
        )
        m = result.metrics
        moved = torch.where(action_mask.bool(), old_log_probs - log_probs.detach(), 0.0)
        ppo_kl = (
            moved.sum() / action_mask.sum()
        )  # to the old policy, also where the ratio is to the sampler
        if "rollout_k1" not in m:
            return result.loss, m["clip_region"], ppo_kl, None, None
        return (
            result.loss,
            m["clip_region"],
            m["actor/ppo_kl"],
            m["rollout_k1"],
            m["rollout_outside"],
        )


def _correction(level: str, mode: str, gating: str, threshold: Any, gspo: bool) -> dict[str, Any]:
    """Correction and gates of OpenRLHF's is_correction_* arguments."""
    if level == "off":
        return {}
    if gspo:  # the ratio is taken to the sampler instead
        return {"correction": Correction(bypass=True)}
    low, high = threshold
    asked = f"is_correction level {level!r}, mode {mode!r}, gating {gating!r}"
    if level not in ("token", "seq") or mode not in ("mask", "clip"):
        raise ValueError(f"{asked} is unknown: token or seq, mask or clip")
    if mode == "clip":
        if level == "seq" or gating != "ratio":
            raise ValueError(f"{asked} is not covered: clip needs level token and gating ratio")
        return {"correction": Correction(low=low, high=high, log_clamp=None)}
    if gating == "ratio" and level == "token":
        return {"correction": Correction(mode="mask", low=low, high=high, log_clamp=None)}
    weight = Correction(high=math.inf, log_clamp=None)
    if gating == "ratio":
        gate = Gate(stat="k1", low=math.log(low) if low > 0 else -math.inf, high=math.log(high),
                    between="old_rollout", pool="seq_mean")  # fmt: skip
        return {"correction": weight, "gates": (gate,)}
    if level == "seq" or gating not in ("tv", "binary_kl"):
        raise ValueError(f"{asked} is not covered")
    stat: Any = gating  # signed here, so the bound stands on both sides
    return {
        "correction": weight,
        "gates": (Gate(stat=stat, low=-high, high=high, between="old_rollout"),),
    }


LOGPROBS = Swap("openrlhf", "openrlhf.models.utils", "log_probs_from_logits", log_probs_from_logits)
LOSS = Swap("openrlhf", "openrlhf.models.loss", "PolicyLoss", PolicyLoss)


def enable() -> None:
    """Replace both."""
    LOGPROBS.enable()
    LOSS.enable()


def disable() -> None:
    """Put OpenRLHF's own back."""
    LOGPROBS.disable()
    LOSS.disable()

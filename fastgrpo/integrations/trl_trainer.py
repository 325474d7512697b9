"""`FastGRPOTrainer`: TRL's GRPO trainer with the gradient of `linear_grpo_loss`, value and metrics from TRL itself.

Where the configuration is covered, the head's forward makes loss and gradient in one pass and leaves out the rows that
have none (masked, clipped, zero advantage): three matrix products over the active rows instead of four over all. TRL's
own `_compute_loss` then runs on the detached log-probs, so that loss value, metrics, logging and the entropy controller
are TRL's code. Anything else delegates to TRL with fastgrpo's head; `delegates` says why, and a warning is logged.
"""

import hashlib
import inspect
import logging
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from fastgrpo.choices import Reduce
from fastgrpo.convert.trl import objective_from_trl
from fastgrpo.integrations.trl import check_contract, serving, use_fastgrpo
from fastgrpo.integrations.trl_loss import LossRequest
from fastgrpo.objective import Objective

# Source of GRPOTrainer._compute_loss that `LossRequest` is known to agree with.
KNOWN = {"1.16.0": "80295546bbdbf6f711acce7f6e69b0100ab40aa8f23ed8052cc564ff024e3e40"}
WINDOW = ("cispo", "dapo", "vespo")  # loss types whose denominator spans the optimizer step

_log = logging.getLogger(__name__)


class FastGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """GRPOTrainer on fastgrpo's kernels; same arguments, same logs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Check TRL's contract, build TRL's trainer, and decide whether the one-pass loss covers its configuration."""
        check_contract()
        self._request: LossRequest | None = None
        super().__init__(*args, **kwargs)
        self.delegates = self._why_not()
        if self.delegates:
            _log.warning("FastGRPOTrainer leaves the loss to TRL: %s", self.delegates)

    def _why_not(self) -> str | None:
        """Why the loss is TRL's, or None."""
        source = inspect.getsource(GRPOTrainer._compute_loss)
        if hashlib.sha256(source.encode()).hexdigest() not in KNOWN.values():
            return f"GRPOTrainer._compute_loss of TRL {version('trl')} is not the known one ({', '.join(KNOWN)})"
        if super()._compute_loss.__func__ is not GRPOTrainer._compute_loss:
            return f"{type(self).__name__} has a loss of its own"
        if self.top_entropy_quantile < 1.0:
            return "top_entropy_quantile needs the entropies of the whole batch before the loss"
        try:
            self._objective(sampler_scored=False)
        except ValueError as error:
            return str(error)
        return None

    def _objective(self, sampler_scored: bool) -> Objective:
        """The configuration as an objective, without the entropy bonus."""
        handled = ["entropy_coef", "use_adaptive_entropy"]
        if self.loss_type != "vespo":
            handled.append("vllm_importance_sampling_correction")
        return objective_from_trl(self.args, handled=handled, sampler_scored=sampler_scored)

    def _entropy_coefficient(self) -> float:
        """The coefficient that TRL's controller applies in this micro-batch, divided as TRL divides it."""
        if not self._entropy_bonus_enabled:
            return 0.0
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            return 0.0
        return float(self.entropy_coef / self.current_gradient_accumulation_steps)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss value; the gradient of the one-pass loss if it covers the configuration."""
        if self.delegates or not (self.model.training and torch.is_grad_enabled()):
            return super()._compute_loss(model, inputs)
        self._request = request = self._make_request(inputs)
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self._request = None
        return loss + self._gradient if request.served else loss

    def _get_per_token_logps_and_entropies(
        self, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's scoring through fastgrpo's head; within `_compute_loss` the head makes loss and gradient too."""
        request = self._request
        with use_fastgrpo(), serving(request):
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if request is not None and request.served:
            self._gradient = request.take(logps)
            logps = logps.detach()
        return logps, entropies, aux_loss

    def _make_request(self, inputs: dict[str, Any]) -> LossRequest:
        """What `_compute_loss` of TRL reads from the inputs, in fastgrpo's terms."""
        completion, tools = inputs["completion_mask"], inputs.get("tool_mask")
        mask = completion if tools is None else completion * tools
        sampled = inputs.get("sampling_per_token_logps")
        objective = self._objective(sampler_scored=sampled is not None).replace(
            entropy_coef=self._entropy_coefficient(), entropy_reduce=Reduce(per="token")
        )
        weight = inputs.get("importance_sampling_ratio") if self.loss_type != "vespo" else None
        uses_sampled = objective.correction is not None or objective.gates
        return LossRequest(
            objective=objective,
            normalizer=self._normalizer(inputs, mask),
            mask=mask.bool(),
            scored=completion.bool(),
            width=inputs["prompt_ids"].shape[1] + completion.shape[1] - 1,
            advantage=inputs["advantages"],
            old_logprob=inputs.get("old_per_token_logps"),
            ref_logprob=inputs["ref_per_token_logps"] if self.beta else None,
            rollout_logprob=sampled if uses_sampled else None,
            token_weight=None if weight is None else weight.expand(completion.shape),
        )

    def _normalizer(self, inputs: dict[str, Any], mask: Tensor) -> float | Tensor:
        """TRL's denominator, in what the objective's reduction counts."""
        steps = self.current_gradient_accumulation_steps
        if self.loss_type in WINDOW:
            items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            return items * steps / self.args.steps_per_generation
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1) * steps
        return float(mask.shape[0] * steps)

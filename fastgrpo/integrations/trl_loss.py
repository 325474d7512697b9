"""One pass through the head inside TRL's model forward: the loss's inputs go in, the loss comes out with its graph."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastgrpo.linear_losses import linear_grpo_loss
from fastgrpo.losses import PolicyLoss
from fastgrpo.objective import Objective


class CarryFunction(torch.autograd.Function):
    """Log-probs that carry the loss's gradient, so that it passes through the outputs of the model's forward.

    FSDP hangs its backward hooks on those outputs; a loss beside them would miss the hooks.
    """

    @staticmethod
    def forward(logprob: Tensor, loss: Tensor) -> Tensor:
        """Return the log-probs."""
        return logprob.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing to keep."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprob: Tensor) -> tuple[None, Tensor]:
        """Hand the sum of what arrives to the loss."""
        return None, dlogprob.sum()


class TakeFunction(torch.autograd.Function):
    """The other end: a zero whose gradient enters the carrying log-probs at one position."""

    @staticmethod
    def forward(logprob: Tensor, index: Tensor) -> Tensor:
        """Return 0."""
        return logprob.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep the position."""
        ctx.shape = inputs[0].shape
        ctx.save_for_backward(inputs[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """Put the upstream gradient at the position, exactly once."""
        (index,) = ctx.saved_tensors
        flat = upstream.new_zeros(ctx.shape.numel())
        return flat.scatter(0, index.reshape(1), upstream.reshape(1)).view(ctx.shape), None


@dataclass
class LossRequest:
    """Loss inputs of one micro-batch of completions, [B, T] or [B]; `served` once the head has used them."""

    objective: Objective
    normalizer: float | Tensor
    mask: Tensor  # tokens of the loss
    scored: Tensor  # tokens that TRL scores: tool results are, though they are not trained on
    width: int  # positions of a sequence that TRL sends to the head where it sends all
    advantage: Tensor
    old_logprob: Tensor | None
    ref_logprob: Tensor | None
    rollout_logprob: Tensor | None
    token_weight: Tensor | None
    served: bool = False

    def serve(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, **head: Any
    ) -> tuple[Tensor, Tensor] | None:
        """Log-probs and entropies of the rows TRL asks for, or None if they are not this batch's."""
        batch = self.mask.shape[0]
        if targets.shape[0] == batch * self.width:
            shape: tuple[int, ...] = (batch, self.width)
            fit, offsets = self._padded, None
        elif targets.shape[0] == int(self.scored.sum()):
            shape, fit = (targets.shape[0],), self._packed
            offsets = torch.nn.functional.pad(self.scored.sum(1).cumsum(0), (1, 0))
        else:
            return None
        result = linear_grpo_loss(
            hidden.view(*shape, hidden.shape[-1]),
            weight,
            targets.view(shape),
            self.advantage if self.advantage.dim() == 1 else fit(self.advantage),
            fit(self.mask),
            old_logprob=fit(self.old_logprob),
            ref_logprob=fit(self.ref_logprob),
            rollout_logprob=fit(self.rollout_logprob),
            token_weight=fit(self.token_weight),
            objective=self.objective,
            normalizer=self.normalizer,
            cu_seqlens=offsets,
            **head,
        )
        self.served = True
        return self._outputs(result)

    @staticmethod
    def _outputs(result: PolicyLoss) -> tuple[Tensor, Tensor]:
        assert result.logprob is not None
        assert result.entropy is not None
        return CarryFunction.apply(result.logprob.flatten(), result.loss), result.entropy.flatten()

    def _padded(self, value: Any) -> Any:
        return (
            None
            if value is None
            else torch.nn.functional.pad(value, (self.width - value.shape[1], 0))
        )

    def _packed(self, value: Any) -> Any:
        return None if value is None else value[self.scored]

    def take(self, logprob: Tensor) -> Tensor:
        """A zero with the gradient of the loss, from the [B, T] log-probs that TRL got."""
        return TakeFunction.apply(logprob, self.scored.flatten().to(torch.int8).argmax())

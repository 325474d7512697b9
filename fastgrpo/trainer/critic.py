"""PPO's value model: what the tokens that follow are expected to earn.

It is a network of its own, of the policy's size (DeepSeekMath, section 4.1.1): a copy of the policy's backbone with a
linear head that says 0 at first. So the policy's forward, and what a checkpoint's `model.safetensors` holds, are those
of GRPO, and neither network's gradient disturbs the other's features.
"""

import copy

from torch import Tensor, nn

from fastgrpo.trainer.data.batch import TokenBatch
from fastgrpo.trainer.policy import Policy, half_precision, hidden_rows

LEARNING_RATE_FACTOR = 10
"""The value model's learning rate over the policy's (verl's and OpenRLHF's default): it starts from knowing nothing."""


class Critic(nn.Module):
    """The value model of a policy."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.model = copy.deepcopy(policy.model.get_decoder())
        weight = policy.model.get_output_embeddings().weight
        self.bf16 = policy.bf16
        self.head = nn.Linear(weight.shape[1], 1, device=weight.device)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, batch: TokenBatch) -> Tensor:  # [N] float32
        """The value of the state before each completion token."""
        with half_precision(batch, self.bf16):
            hidden = hidden_rows(self.model, batch)
        value: Tensor = self.head(hidden.float())[:, 0]
        return value

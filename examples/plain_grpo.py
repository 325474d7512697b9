"""GRPO in plain PyTorch, before and after: the same loop with eager losses and with fastgrpo's fused ones.

    python examples/plain_grpo.py

A one-layer policy learns on a CPU, in seconds, to copy its prompt. Both loops see the same random numbers and take the
same steps; the second never holds all the logits of a batch and multiplies no row that has nothing to learn.
"""

import torch
from torch import nn

from fastgrpo import Objective, group_advantage, linear_grpo_loss

VOCABULARY, LENGTH, PROMPTS, GROUP, STEPS = 12, 3, 16, 8, 60


class Policy(nn.Module):
    """Predicts token t of the completion from token t of the prompt."""

    def __init__(self) -> None:
        """Make an embedding, a hidden layer and a head."""
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.layer = nn.Sequential(nn.Linear(32, 64), nn.Tanh())
        self.head = nn.Linear(64, VOCABULARY, bias=False)

    def hidden(self, prompt: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, H] that the head turns into logits."""
        return self.layer(self.embed(prompt))  # type: ignore[no-any-return]


def before(
    policy: Policy, prompt: torch.Tensor, tokens: torch.Tensor, reward: torch.Tensor
) -> torch.Tensor:
    """Eager GRPO: log-softmax over all the logits, then the clipped ratio, then the mean."""
    logprob = policy.head(policy.hidden(prompt)).log_softmax(-1)
    logprob = logprob.gather(-1, tokens[..., None])[..., 0]
    groups = reward.view(PROMPTS, GROUP)
    advantage = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    ratio, advantage = (logprob - logprob.detach()).exp(), advantage.view(-1, 1)
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean(1).mean()


def after(
    policy: Policy, prompt: torch.Tensor, tokens: torch.Tensor, reward: torch.Tensor
) -> torch.Tensor:
    """The same in two calls, from the hidden states on."""
    advantage = group_advantage(reward, group_size=GROUP).advantage
    mask, hidden = torch.ones_like(tokens, dtype=torch.bool), policy.hidden(prompt)
    return linear_grpo_loss(
        hidden, policy.head.weight, tokens, advantage, mask, objective=Objective.grpo()
    ).loss


def train(loss_function: object) -> list[float]:
    """Sample, reward, take a step; returns the mean reward of each step."""
    torch.manual_seed(0)
    policy = Policy()
    optimizer, history = torch.optim.Adam(policy.parameters(), lr=1e-2), []
    for _ in range(STEPS):
        prompt = torch.randint(VOCABULARY, (PROMPTS, LENGTH)).repeat_interleave(GROUP, dim=0)
        with torch.no_grad():
            probabilities = policy.head(policy.hidden(prompt)).softmax(-1)
        tokens = torch.multinomial(probabilities.view(-1, VOCABULARY), 1).view(-1, LENGTH)
        reward = (tokens == prompt).float().mean(1)
        loss = loss_function(policy, prompt, tokens, reward)  # type: ignore[operator]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(reward.mean()))
    return history


if __name__ == "__main__":
    for name, function in (("before", before), ("after", after)):
        rewards = train(function)
        print(f"{name:<8}reward {rewards[0]:.3f} -> {rewards[-1]:.3f}")

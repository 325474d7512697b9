"""A small batch with everything in it, shared by the tests of the linear ops."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastgrpo import Objective
from fastgrpo.choices import KL, Gate, Reduce
from fastgrpo.functional.linear.gemm import DirectHead, Head

B, T, H, V = 5, 7, 6, 29  # sizes that divide nothing
ROW_BYTES = 32 * 8  # a float64 row of logits in the workspace, whose rows are padded to 64 bytes


class Batch(NamedTuple):
    """Arguments of `linear_grpo_loss`."""

    hidden: Tensor  # [B, T, H]
    weight: Tensor  # [V, H]
    bias: Tensor  # [V]
    token_ids: Tensor
    advantage: Tensor  # [B]; one is 0
    mask: Tensor  # ragged, one sequence empty
    old_logprob: Tensor
    ref_logprob: Tensor

    def leaves(self) -> list[Tensor]:
        """Fresh leaves of hidden, weight and bias."""
        return [t.detach().clone().requires_grad_() for t in self[:3]]

    def options(self) -> dict[str, Tensor]:
        """Log-probs of the other policies."""
        return {"old_logprob": self.old_logprob, "ref_logprob": self.ref_logprob}


def make_batch(dtype=torch.float64, noise=0.3, seed=0, scale=1.0) -> Batch:
    """Random completions; old and reference log-probs are the policy's own plus noise that clips some tokens."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight, bias = (x.to(dtype) for x in (normal(B, T, H) * scale, normal(V, H), normal(V)))
    ids = torch.randint(V, (B, T), generator=g)
    mask = torch.arange(T) < torch.tensor([7, 4, 0, 6, 5])[:, None]
    mask[3, 2] = False  # a hole, as tool output leaves one
    logits = hidden.double() @ weight.double().t() + bias.double()
    logprob = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    old, ref = ((logprob + noise * normal(B, T)).to(wide) for _ in range(2))
    advantage = torch.tensor([0.7, -1.2, 0.4, 0.0, -0.3], dtype=wide)
    return Batch(hidden, weight, bias, ids, advantage, mask, old, ref)


OBJECTIVES = {
    "grpo": Objective.grpo(),
    "grpo, kl": Objective.grpo(beta=0.1, delta=2.0),
    "dapo": Objective.dapo(),
    "bnpo, k2": Objective.bnpo().replace(kl=KL(beta=0.2, estimator="k2")),
    "dr_grpo": Objective.dr_grpo(10),
    "ppo": Objective.ppo(),
    "gspo": Objective.gspo(epsilon=0.1, epsilon_high=0.1),
    "gspo, kl": Objective.gspo(epsilon=0.1, epsilon_high=0.1, beta=0.1),
    "gspo_token": Objective.gspo_token(epsilon=0.1, epsilon_high=0.1),
    "luspo": Objective.luspo(epsilon=0.1, epsilon_high=0.1),
    "gmpo": Objective.gmpo(),
    "cispo": Objective.cispo(epsilon_high=1.2),
    "sapo": Objective.sapo(),
    "vespo": Objective.vespo(),
    "rloo": Objective.rloo(),
    "reinforce": Objective.reinforce(),
    "gpg": Objective.gpg(),
    "topr": Objective.topr(),
    "dppo_tv": Objective.dppo_tv(low=0.05, high=0.05),
    "dppo_kl": Objective.dppo_kl(low=0.01, high=0.01),
    "dro": Objective.dro(beta=0.3),
    "entropy bonus": Objective.grpo().replace(entropy_coef=0.05),
    "sequence gate": Objective.dapo().replace(gates=(Gate(stat="k3", high=0.3, pool="seq_mean"),)),
    "token sum": Objective.grpo().replace(reduce=Reduce(power=0.0)),
}


class Products:
    """Counts the rows that go through each matrix product of a head."""

    def __init__(self, monkeypatch, head: type[Head] = DirectHead) -> None:
        self.logits = self.hidden = self.weight = 0
        project, add_gradients = head.project, head.add_gradients

        def counted_project(head, rows, out):
            self.logits += rows.shape[0]
            project(head, rows, out)

        def counted_gradients(head, task):
            rows = task.dlogits.shape[0]
            self.hidden += rows * (task.dhidden is not None)
            if (
                task.dweight is not None
            ):  # a slab of the weight at a time, where it will be converted
                self.weight += rows * task.dlogits.shape[1] / head.weight.shape[0]
            add_gradients(head, task)

        monkeypatch.setattr(head, "project", counted_project)
        monkeypatch.setattr(head, "add_gradients", counted_gradients)

    def take(self) -> tuple[int, int, int]:
        """Rows so far (logits, hidden gradient, weight gradient), and start again from 0."""
        counts = (self.logits, self.hidden, round(self.weight))
        self.logits = self.hidden = self.weight = 0
        return counts

"""Arguments of every op, as the public functions pass them: for opcheck and the comparison of fakes with kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgrpo import group_advantage, grpo_loss, kl_estimate, policy_loss, token_logprob
from fastgrpo.advantages import gae
from fastgrpo.testing import make_inputs
from tests.ops.common import OBJECTIVES


class Recorder(TorchDispatchMode):
    """Keeps a copy of the arguments of every call of an op of the package."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith("fastgrpo::"):
            copied = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
            self.calls.setdefault(name.removeprefix("fastgrpo::"), []).append(copied)
        return func(*args, **(kwargs or {}))


def _uses(dtype: torch.dtype) -> list[Callable[[], Tensor]]:
    """Calls of the public functions that together reach every op in its main configurations."""
    data = make_inputs(3, 4, 13, dtype, seed=7)
    ids, mask, advantage = data.token_ids, data.mask, data.advantage
    sides = {"old_logprob": data.old_logprob, "ref_logprob": data.ref_logprob}
    per_row = torch.full((3, 4), 0.7)
    leaf = data.logits.requires_grad_()
    packed = leaf.reshape(12, 13)
    cu_seqlens = torch.tensor([0, 4, 9, 12], dtype=torch.int32)
    logprob = data.old_logprob.clone().requires_grad_()
    return [
        lambda: token_logprob(leaf, ids).logprob.sum(),
        lambda: sum(x.sum() for x in token_logprob(leaf, ids, mask=mask, with_entropy=True, temperature=per_row)),
        lambda: token_logprob(leaf, ids, logit_scale=0.5, logit_softcap=10.0).logprob.sum(),
        lambda: policy_loss(logprob, advantage, mask, objective=OBJECTIVES["grpo_kl"], **sides).loss,
        lambda: policy_loss(logprob, advantage, mask, objective=OBJECTIVES["gspo"], **sides).token_loss.sum(),
        lambda: policy_loss(
            logprob.flatten(), advantage, mask.flatten(), cu_seqlens=cu_seqlens, objective=OBJECTIVES["dppo_tv"]
        ).loss,
        lambda: grpo_loss(leaf, ids, advantage, mask, grad_scale=2.0, **sides).loss * 3.0,
        lambda: grpo_loss(
            packed, ids.flatten(), advantage, mask.flatten(), cu_seqlens=cu_seqlens, with_entropy=False
        ).loss,
        lambda: kl_estimate(logprob, data.ref_logprob, "k2", gradient="ratio", old_logprob=data.old_logprob).sum(),
        lambda: group_advantage(advantage.clone().requires_grad_(), group_size=3).advantage.square().sum(),
        lambda: gae(logprob, torch.zeros(3, 4), mask, gamma=0.9, lam=0.95).advantage.sum(),
    ]  # fmt: skip


def op_samples(dtype: torch.dtype = torch.float32) -> dict[str, list[tuple[Any, ...]]]:
    """Op name -> argument tuples, forward and backward."""
    with Recorder() as recorder:
        for use in _uses(dtype):
            use().backward()
    return recorder.calls

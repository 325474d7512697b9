"""From rewards to group advantages."""

import torch

from fastgrpo import group_advantage
from fastgrpo.bench.problems import GROUP, Problem
from fastgrpo.bench.providers.base import Contestant, Outputs, provider


@provider("advantage", "eager", note="exact ties are not zero")
def eager(problem: Problem) -> Contestant:
    """Mean and standard deviation over a view of the groups."""
    reward = problem.reward
    assert reward is not None

    def run() -> Outputs:
        grouped = reward.view(-1, GROUP)
        centred = grouped - grouped.mean(1, keepdim=True)
        return {"advantage": (centred / (grouped.std(1, keepdim=True) + 1e-4)).reshape(-1)}

    return Contestant(run)


@provider("advantage", "TRL", needs="trl", note="NaN-aware; its formula with its helpers")
def trl(problem: Problem) -> Contestant:
    """The NaN-aware sequence of operations of TRL's trainer."""
    from trl.trainer.utils import nanstd

    reward = problem.reward
    assert reward is not None

    def run() -> Outputs:
        grouped = reward.view(-1, GROUP)
        mean = torch.nanmean(grouped, dim=1).repeat_interleave(GROUP, dim=0)
        std = nanstd(grouped, dim=1).repeat_interleave(GROUP, dim=0)
        return {"advantage": (reward - mean) / (std + 1e-4)}

    return Contestant(run)


@provider("advantage", "fastgrpo", ours=True)
def ours(problem: Problem) -> Contestant:
    """`group_advantage`."""
    reward = problem.reward
    assert reward is not None
    return Contestant(lambda: {"advantage": group_advantage(reward, group_size=GROUP).advantage})

"""Fused kernels for Group Relative Policy Optimization, and a thin trainer.

The names below are the public interface. They load on first use, so `import fastgrpo` is instant and imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastgrpo.advantages import (
        GroupAdvantage,
        gae,
        group_advantage,
        process_advantage,
        value_loss,
    )
    from fastgrpo.choices import KL, Correction, Gamma, Gate, Reduce, Sigmoid
    from fastgrpo.functional.checks import checks
    from fastgrpo.functional.kl_estimate import kl_estimate
    from fastgrpo.functional.linear.workspace import release_workspace
    from fastgrpo.functional.linear_token_logprob import linear_token_logprob
    from fastgrpo.functional.linear_token_statistics import (
        TokenStatistics,
        linear_token_statistics,
    )
    from fastgrpo.functional.support_logprob import linear_support_logprob, support_logprob
    from fastgrpo.functional.token_logprob import TokenLogprob, token_logprob
    from fastgrpo.functional.vocabulary_parallel_token_logprob import (
        vocabulary_parallel_token_logprob,
    )
    from fastgrpo.linear_losses import LinearGRPOLoss, linear_grpo_loss
    from fastgrpo.losses import GRPOLoss, PolicyLoss, grpo_loss, policy_loss
    from fastgrpo.metrics import Metrics
    from fastgrpo.objective import Objective
    from fastgrpo.ops.report import backend_report
    from fastgrpo.reduction import global_normalizer
    from fastgrpo.row_plan import RowPlan, plan_rows
    from fastgrpo.surrogates import register_surrogate

_HOMES = {
    "Correction": "fastgrpo.choices",
    "GRPOLoss": "fastgrpo.losses",
    "Gamma": "fastgrpo.choices",
    "Gate": "fastgrpo.choices",
    "GroupAdvantage": "fastgrpo.advantages",
    "KL": "fastgrpo.choices",
    "LinearGRPOLoss": "fastgrpo.linear_losses",
    "Metrics": "fastgrpo.metrics",
    "Objective": "fastgrpo.objective",
    "PolicyLoss": "fastgrpo.losses",
    "Reduce": "fastgrpo.choices",
    "RowPlan": "fastgrpo.row_plan",
    "Sigmoid": "fastgrpo.choices",
    "TokenLogprob": "fastgrpo.functional.token_logprob",
    "TokenStatistics": "fastgrpo.functional.linear_token_statistics",
    "backend_report": "fastgrpo.ops.report",
    "checks": "fastgrpo.functional.checks",
    "gae": "fastgrpo.advantages",
    "global_normalizer": "fastgrpo.reduction",
    "group_advantage": "fastgrpo.advantages",
    "grpo_loss": "fastgrpo.losses",
    "kl_estimate": "fastgrpo.functional.kl_estimate",
    "linear_grpo_loss": "fastgrpo.linear_losses",
    "linear_support_logprob": "fastgrpo.functional.support_logprob",
    "linear_token_logprob": "fastgrpo.functional.linear_token_logprob",
    "linear_token_statistics": "fastgrpo.functional.linear_token_statistics",
    "plan_rows": "fastgrpo.row_plan",
    "policy_loss": "fastgrpo.losses",
    "process_advantage": "fastgrpo.advantages",
    "register_surrogate": "fastgrpo.surrogates",
    "release_workspace": "fastgrpo.functional.linear.workspace",
    "support_logprob": "fastgrpo.functional.support_logprob",
    "token_logprob": "fastgrpo.functional.token_logprob",
    "value_loss": "fastgrpo.advantages",
    "vocabulary_parallel_token_logprob": "fastgrpo.functional.vocabulary_parallel_token_logprob",
}

__all__ = [
    "KL",
    "Correction",
    "GRPOLoss",
    "Gamma",
    "Gate",
    "GroupAdvantage",
    "LinearGRPOLoss",
    "Metrics",
    "Objective",
    "PolicyLoss",
    "Reduce",
    "RowPlan",
    "Sigmoid",
    "TokenLogprob",
    "TokenStatistics",
    "backend_report",
    "checks",
    "gae",
    "global_normalizer",
    "group_advantage",
    "grpo_loss",
    "kl_estimate",
    "linear_grpo_loss",
    "linear_support_logprob",
    "linear_token_logprob",
    "linear_token_statistics",
    "plan_rows",
    "policy_loss",
    "process_advantage",
    "register_surrogate",
    "release_workspace",
    "support_logprob",
    "token_logprob",
    "value_loss",
    "vocabulary_parallel_token_logprob",
]


def __getattr__(name: str) -> object:
    """Import a public name from its module when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        from fastgrpo.words import did_you_mean

        hint = did_you_mean(name, __all__)
        raise AttributeError(f"module 'fastgrpo' has no attribute {name!r}.{hint}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

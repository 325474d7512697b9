"""TRL >= 1.15: fastgrpo's head under every TRL trainer, and a GRPO trainer that skips dead rows.

    import fastgrpo.integrations.trl as fast
    fast.enable()                                # GRPO, RLOO, SFT, DPO, KTO and async GRPO from now on
    with fast.use_fastgrpo(): trainer.train()    # the same for one block
    fast.FastGRPOTrainer(...)                    # GRPOTrainer with the loss of fastgrpo as well

TRL sends every token through one function, `trl.trainer.utils._ChunkedLogProbFunction`; `enable` replaces that symbol,
so PEFT, FSDP, DeepSpeed, autocast, MoE, tools and logging stay TRL's. A call that asks for what fastgrpo does not know
goes to TRL's own function; `report()` counts both.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from torch import Tensor
from trl.trainer import utils

from fastgrpo.functional.linear_token_statistics import linear_token_statistics
from fastgrpo.integrations.contracts import contract
from fastgrpo.integrations.trl_zero3 import is_partitioned, score_gathered

if TYPE_CHECKING:
    from fastgrpo.integrations.trl_loss import LossRequest
    from fastgrpo.integrations.trl_trainer import FastGRPOTrainer as FastGRPOTrainer

SYMBOL = "_ChunkedLogProbFunction"
# TRL's names of the outputs -> ours.
NAMES = {name: name for name in ("log_probs", "entropy", "log_sum_sq_probs", "is_top1")}
NAMES["mean_logits"] = "mean_logit"
Scores = tuple[Tensor | None, ...]

_log = logging.getLogger(__name__)
_original: Any = None
_request: "LossRequest | None" = None
_calls = {"fastgrpo": 0, "trl": 0}


def check_contract() -> None:
    """Raise ImportError unless the installed TRL (>= 1.15) has the function this adapter replaces."""
    if not is_enabled():
        contract("trl").check()


def enable() -> None:
    """Replace TRL's function; enabling twice changes nothing more."""
    global _original
    check_contract()
    if not is_enabled():
        _original = getattr(utils, SYMBOL)
        setattr(utils, SYMBOL, FastLogProbFunction)
        _log.info("fastgrpo serves the log-probs and entropies of TRL %s", version("trl"))


def disable() -> None:
    """Put TRL's own function back."""
    if is_enabled():
        setattr(utils, SYMBOL, _original)


def is_enabled() -> bool:
    """Whether TRL's symbol is ours at the moment."""
    return getattr(utils, SYMBOL, None) is FastLogProbFunction


@contextmanager
def use_fastgrpo() -> Iterator[None]:
    """Enable for a block and restore what was there before."""
    before = is_enabled()
    enable()
    try:
        yield
    finally:
        if not before:
            disable()


@contextmanager
def serving(request: "LossRequest | None") -> Iterator[None]:
    """Let the head answer this request for a loss within a block."""
    global _request
    before, _request = _request, request
    try:
        yield
    finally:
        _request = before


def report() -> dict[str, int]:
    """How many calls fastgrpo served and how many went to TRL's own function, in this process."""
    return dict(_calls)


class FastLogProbFunction:
    """Stands in for TRL's autograd function: `apply` with its arguments and its five results."""

    @staticmethod
    def apply(
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> Scores:
        """Score the targets; an output that fastgrpo does not know, or a scale that is not positive, goes to TRL."""
        if set(outputs) - NAMES.keys() or not logit_scale > 0:
            _calls["trl"] += 1
            theirs: Scores = _original.apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )  # fmt: skip
            return theirs
        _calls["fastgrpo"] += 1
        scaling: dict[str, Any] = {
            "temperature": temperature,
            "logit_scale": logit_scale,
            "logit_softcap": final_logit_softcapping,
        }
        if _request is not None and not is_partitioned(weight):
            found = _request.serve(hidden, weight, targets, bias=bias, **scaling)
            if found is not None:
                return *found, None, None, None
        score = score_gathered if is_partitioned(weight) else linear_token_statistics
        wanted = [NAMES[name] for name in outputs if name != "log_probs"]
        return tuple(score(hidden, weight, targets, outputs=wanted, bias=bias, **scaling))


def __getattr__(name: str) -> Any:
    """Load the trainer, and with it all of TRL's, when it is first asked for."""
    if name == "FastGRPOTrainer":
        from fastgrpo.integrations.trl_trainer import FastGRPOTrainer

        return FastGRPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

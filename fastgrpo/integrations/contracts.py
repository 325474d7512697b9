"""What each adapter relies on in its host, and whether the installed host still has it."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True)
class Signature:
    """A callable of the host, by module and attribute, with the parameters the adapter was written against."""

    module: str
    attribute: str  # dotted inside the module
    parameters: tuple[str, ...]

    def find(self) -> Callable[..., Any]:
        """Return the callable, or raise ImportError naming what is missing."""
        value: Any = importlib.import_module(self.module)
        for name in self.attribute.split("."):
            if not hasattr(value, name):
                raise ImportError(f"{self.module}.{self.attribute} does not exist")
            value = getattr(value, name)
        return value

    def check(self) -> None:
        """Raise ImportError unless the callable takes exactly the recorded parameters."""
        found = tuple(inspect.signature(self.find()).parameters)
        if found != self.parameters:
            raise ImportError(
                f"{self.module}.{self.attribute} takes {found}, this adapter knows {self.parameters}"
            )


@dataclass(frozen=True)
class Contract:
    """A host: the distribution's name, the module to import, and the symbols that its adapter uses."""

    host: str
    package: str
    signatures: tuple[Signature, ...]

    def check(self) -> None:
        """Raise ImportError with the host's version unless every symbol is as recorded."""
        for signature in self.signatures:
            try:
                signature.check()
            except ImportError as error:
                raise ImportError(
                    f"{error}; {self.host} {self.installed_version()} is installed"
                ) from error

    def installed_version(self) -> str | None:
        """Version of the host's distribution, "unknown" for a source tree, None if it is not installed."""
        try:
            return version(self.host)
        except PackageNotFoundError:
            return "unknown" if find_spec(self.package) is not None else None


def _names(words: str) -> tuple[str, ...]:
    return tuple(words.split())


CONTRACTS = (
    Contract(
        "trl",
        "trl",
        (
            Signature(
                "trl.trainer.utils",
                "_ChunkedLogProbFunction.forward",
                _names(
                    "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs"
                ),
            ),
            Signature("trl.trainer.utils", "maybe_gather_lm_head_ctx", ("params",)),
        ),
    ),
    Contract(
        "verl",
        "verl",
        (
            Signature(
                "verl.trainer.ppo.core_algos",
                "compute_policy_loss_vanilla",
                _names(
                    "old_log_prob log_prob advantages response_mask loss_agg_mode config rollout_is_weights"
                ),
            ),
            Signature("verl.trainer.ppo.core_algos", "register_policy_loss", ("name",)),
            Signature("verl.trainer.ppo.core_algos", "register_adv_est", ("name_or_enum",)),
            Signature(
                "verl.utils.kernel.linear_cross_entropy",
                "LinearCrossEntropy.forward",
                _names("ctx hidden weight labels temperature reduction dist_process_group"),
            ),
        ),
    ),
    Contract(
        "openrlhf",
        "openrlhf",
        (
            Signature(
                "openrlhf.models.utils",
                "log_probs_from_logits",
                _names("logits labels temperature"),
            ),
            Signature(
                "openrlhf.models.loss",
                "PolicyLoss.forward",
                _names(
                    "self log_probs old_log_probs advantages action_mask rollout_log_probs dp_size batch_num_tokens "
                    "global_batch_size"
                ),
            ),
        ),
    ),
    Contract(
        "prime-rl",
        "prime_rl",
        (
            Signature(
                "prime_rl.trainer.models.layers.lm_head",
                "_SequenceChunkedLogProbEntropyFn.forward",
                _names("ctx hidden weight labels inv_temperature chunk_size"),
            ),
        ),
    ),
    Contract(
        "areal",
        "areal",
        (
            Signature(
                "areal.engine.fsdp_engine",
                "gather_logprobs_entropy",
                _names("logits labels temperature tp_group chunk_size"),
            ),
        ),
    ),
    Contract(
        "ms-swift",
        "swift",
        (
            Signature(
                "swift.rlhf_trainers.grpo_trainer",
                "GRPOTrainer._get_logps_via_local_forward",
                _names("self model model_inputs logits_to_keep input_ids compute_entropy"),
            ),
        ),
    ),
    # Adapters that the host calls by an import path: nothing of the host is replaced, so nothing can drift silently.
    Contract("slime", "slime", ()),
    Contract("nemo-rl", "nemo_rl", ()),
)


@dataclass(frozen=True)
class HostStatus:
    """A host that is installed, and what is wrong with its contract (None: nothing)."""

    host: str
    version: str
    problem: str | None


def contract(host: str) -> Contract:
    """Return the contract of a host by its distribution's name."""
    return next(item for item in CONTRACTS if item.host == host)


def installed(contracts: Sequence[Contract] = CONTRACTS) -> list[HostStatus]:
    """Look at every host that is installed; imports those, which may take seconds."""
    found = []
    for item in contracts:
        host_version = item.installed_version()
        if host_version is None:
            continue
        try:
            item.check()
            problem = None
        except Exception as error:  # a host may fail to import in any way; the report must not
            problem = f"{type(error).__name__}: {error}"
        found.append(HostStatus(item.host, host_version, problem))
    return found

"""What the numbers of a step mean, in plain words; each thing is said once per run."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from fastgrpo.trainer.options.config import TrainConfig

MANY = 0.6
"""Share of groups from which it is worth a word that they teach nothing."""
MISMATCH = 0.01
"""A difference of log-probabilities between trainer and sampler that rounding does not explain in float32."""


class Finding(NamedTuple):
    """When something is worth saying, and what; `{name}` in the text is a metric or an option."""

    applies: Callable[[Mapping[str, float], TrainConfig], bool]
    text: str


def _mismatch(numbers: Mapping[str, float]) -> bool:
    return numbers.get("sampling/sampling_logp_difference/mean", 0.0) > MISMATCH


def _in_groups(config: TrainConfig) -> bool:
    """Whether advantages are comparisons within a group: not under PPO, nor where every line is rewarded."""
    return config.objective != "ppo" and config.supervision == "outcome"


FINDINGS = (
    Finding(
        lambda m, c: (
            _in_groups(c)
            and c.num_iterations == 1
            and abs(m["loss"]) < 1e-3
            and m["grad_norm"] > 1e-3
        ),
        "The loss is about 0 by construction: on-policy the ratio is 1, and the advantages of a group sum to 0. "
        "Its gradient is not 0: watch reward and grad norm instead.",
    ),
    Finding(
        lambda m, c: _in_groups(c) and m["frac_groups_all_best"] > MANY,
        "{frac_groups_all_best:.0%} of groups are all correct: they no longer say which answer is better. "
        "The task is nearly solved; harder questions would teach more.",
    ),
    Finding(
        lambda m, c: _in_groups(c) and m["frac_groups_all_worst"] > MANY,
        "{frac_groups_all_worst:.0%} of groups have no correct completion: nothing can be learned from them. "
        "Ask easier questions, raise --num-generations, or start from a better base.",
    ),
    Finding(
        # Three digits and the end are all there is to copy: who does not end has not learned to.
        lambda m, c: c.job != "copy" and m["completions/clipped_ratio"] > 0.2,
        "{completions/clipped_ratio:.0%} of completions were cut at {max_completion_length} tokens before they ended: "
        "raise --max-completion-length if right answers may be longer.",
    ),
    Finding(
        lambda m, _: m.get("kl", 0.0) > 0.5,
        "KL to the reference is {kl:.2f} (largest token {kl/max:.1f}). A spike in one step is harmless under gradient "
        "clipping; if it stays while the reward falls, lower --learning-rate.",
    ),
    Finding(
        lambda m, c: _mismatch(m) and c.sampler != "vllm",
        "Sampler and trainer disagree on log-probabilities by {sampling/sampling_logp_difference/mean:.3f} on average: "
        "they do not run the same model.",
    ),
    Finding(
        lambda m, c: (
            _mismatch(m) and c.sampler == "vllm" and not c.vllm_importance_sampling_correction
        ),
        "vLLM and trainer disagree on log-probabilities by {sampling/sampling_logp_difference/mean:.3f} on average, as "
        "other kernels in another precision do: --vllm-importance-sampling-correction makes up for it.",
    ),
    Finding(
        lambda m, _: m.get("fault", 0.0) > 0,
        "{fault:.0f} tokens gave a log-probability or a loss that is not finite.",
    ),
)


class Diagnostics:
    """Turns metrics into advice."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._unsaid = list(FINDINGS)

    def advice(self, numbers: Mapping[str, float]) -> list[str]:
        """What is new and worth saying after this step."""
        new = [finding for finding in self._unsaid if finding.applies(numbers, self._config)]
        self._unsaid = [finding for finding in self._unsaid if finding not in new]
        values = {"max_completion_length": self._config.max_completion_length, **numbers}
        return [finding.text.format_map(values) for finding in new]

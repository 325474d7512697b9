"""Importance sampling against the sampler: the weights of the formula, whatever sampler told the log-probabilities."""

from dataclasses import replace

import pytest
import torch

from fastgrpo import linear_grpo_loss
from fastgrpo.trainer import train as loop
from fastgrpo.trainer.algorithm import make_correction, make_objective
from fastgrpo.trainer.clock import Clock
from fastgrpo.trainer.options.config import TrainConfig
from fastgrpo.trainer.policy import hidden_rows
from fastgrpo.trainer.sampling.rollout import Rollout
from fastgrpo.trainer.state import State
from tests.trainer.test_train import SMALL, make_run

CORRECTED = replace(SMALL, vllm_importance_sampling_correction=True, beta=0.0)


def gradient_of_a_step(config: TrainConfig, shift: float = 0.0):
    """Gradient and metrics of one update, the sampler's log-probabilities shifted by up to `shift`."""
    run = make_run(config)
    state, objective = State(run), make_objective(config)
    sampled = state.sampler.sample

    def shifted(*arguments, **options) -> Rollout:
        rollout = sampled(*arguments, **options)
        g = torch.Generator().manual_seed(5)
        noise = [shift * (2 * torch.rand(x.shape, generator=g) - 1) for x in rollout.logprob]
        noisy = [(x + n).clamp(max=0.0) for x, n in zip(rollout.logprob, noise, strict=True)]
        return replace(rollout, logprob=noisy)

    state.sampler.sample = shifted
    state.optimizer.step = lambda: None  # the gradient is computed again below
    scored = loop.sample(state, objective, Clock())
    loop.update(state, scored, objective)
    gradient = torch.cat([p.grad.flatten() for p in run.policy.parameters()])
    return run, scored, gradient, scored.tally.losses(with_kl=False)


@pytest.mark.parametrize(
    "mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
)
@pytest.mark.parametrize("objective", ["grpo", "dapo", "cispo"])
def test_the_gradient_has_the_weights_of_the_formula(mode, objective):
    config = replace(
        CORRECTED,
        objective=objective,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=1.2,
        max_grad_norm=1e9,
    )
    run, scored, gradient, numbers = gradient_of_a_step(config, shift=0.8)
    plain = make_objective(replace(config, vllm_importance_sampling_correction=False))
    run.policy.zero_grad()
    outside = 0
    for batch in scored.portions[0].batches:
        ratio = batch.old_logprob - batch.rollout_logprob
        if mode.startswith("sequence"):
            sizes = batch.tokens.cu_seqlens.diff().tolist()
            ratio = torch.cat([part.sum().expand(len(part)) for part in ratio.split(sizes)])
        weight = ratio.exp()
        outside += int((weight > 1.2).sum())
        weight = weight.clamp(max=1.2) if "truncate" in mode else weight * (weight <= 1.2)
        hidden = hidden_rows(run.policy.model.get_decoder(), batch.tokens)
        linear_grpo_loss(
            hidden,
            run.policy.model.lm_head.weight,
            batch.tokens.token_ids,
            batch.advantage,
            torch.ones_like(batch.tokens.token_ids, dtype=torch.bool),
            old_logprob=batch.old_logprob,
            objective=plain,
            normalizer=scored.portions[0].normalizer,
            cu_seqlens=batch.tokens.cu_seqlens,
            token_weight=weight,
        ).loss.backward()
    expected = torch.cat([p.grad.flatten() for p in run.policy.parameters()])
    assert outside, "no weight met the bound"
    assert float(expected.norm()) > 0
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    ratios = "sampling/importance_sampling_ratio"
    assert (
        numbers[f"{ratios}/min"]
        < numbers[f"{ratios}/mean"]
        < numbers[f"{ratios}/max"]
        <= 1.2 + 1e-6
    )
    assert 0.2 < numbers["sampling/sampling_logp_difference/mean"] < 0.6  # uniform in +-0.8: 0.4


def test_a_sampler_that_agrees_leaves_the_update_as_it_is():
    plain = gradient_of_a_step(replace(CORRECTED, vllm_importance_sampling_correction=False))
    corrected = gradient_of_a_step(CORRECTED)
    scale = float(plain[2].abs().max())
    assert scale > 0
    assert torch.allclose(corrected[2], plain[2], rtol=0, atol=1e-4 * scale)
    assert corrected[3]["sampling/importance_sampling_ratio/max"] == pytest.approx(1.0, abs=1e-4)
    assert "sampling/importance_sampling_ratio/max" not in plain[3]
    for numbers in (plain[3], corrected[3]):
        assert numbers["sampling/sampling_logp_difference/max"] < 1e-5


@pytest.mark.parametrize(
    "changes", [{"num_iterations": 2}, {"steps_per_generation": 2}, {"sampler": "transformers"}]
)
def test_it_goes_with_more_updates_and_with_other_samplers(changes):
    for step in loop.grpo(make_run(replace(CORRECTED, beta=0.1, **changes))):
        assert step.numbers["sampling/sampling_logp_difference/max"] < 1e-5
        assert step.numbers["sampling/importance_sampling_ratio/mean"] == pytest.approx(
            1.0, abs=1e-4
        )


def test_options_become_the_correction():
    assert make_correction(SMALL) is None
    made = make_correction(replace(CORRECTED, vllm_importance_sampling_mode="sequence_mask"))
    assert (made.level, made.mode, made.low, made.high) == ("seq_sum", "mask", 0.0, 3.0)
    with pytest.raises(
        ValueError, match="--vllm-importance-sampling-clip-max must be above 0, got 0"
    ):
        replace(SMALL, vllm_importance_sampling_clip_max=0)

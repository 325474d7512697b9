"""The GRPO loop against the paper's formulas written out, and what its options may and may not change."""

import copy
from dataclasses import replace

import pytest
import torch

from fastgrpo.trainer.algorithm import learning_rate_factor, make_objective
from fastgrpo.trainer.data.batch import make_batch, micro_batches
from fastgrpo.trainer.options.config import TrainConfig
from fastgrpo.trainer.options.jobs import default_config, make_task
from fastgrpo.trainer.policy import Policy
from fastgrpo.trainer.setup import Run
from fastgrpo.trainer.train import grpo
from tests.trainer.conftest import tiny_llama

SMALL = replace(
    default_config("copy"),
    prompts_per_step=4,
    num_generations=4,
    max_steps=2,
    per_device_train_batch_size=16,
    warmup_steps=0,
    max_completion_length=5,
    learning_rate=1e-2,
)


def make_run(config: TrainConfig) -> Run:
    """A copy job on a model that is already half right, so that groups have spread."""
    task = make_task(config)
    tokenizer = task.tokenizer()
    model = tiny_llama(tokenizer, hidden_size=16, intermediate_size=24, max_position_embeddings=32)
    return Run(
        config, task, tokenizer, Policy(model, config.temperature).eval(), torch.device("cpu")
    )


def weights(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in run.policy.parameters()])


def train(config: TrainConfig) -> tuple[Run, list]:
    run = make_run(config)
    return run, list(grpo(run))


def eager_logprob(
    model: torch.nn.Module, prompt: list[int], completion: list[int], temperature: float
) -> torch.Tensor:
    logits = (
        model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
    )
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("micro", [16, 3], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("updates", [1, 2])
def test_the_gradient_is_that_of_equation_3(temperature, beta, micro, updates):
    """Eq. 3 written out: A = (r - mean) / std, clipped ratio, k3, mean over tokens and then over completions."""
    config = replace(
        SMALL,
        beta=beta,
        temperature=temperature,
        per_device_train_batch_size=micro,
        num_iterations=updates,
    )
    run = make_run(config)
    policy = copy.deepcopy(run.policy.model)
    reference = copy.deepcopy(policy)
    step = next(grpo(run))

    pairs = list(zip(step.rollout.prompt_ids, step.rollout.completion_ids, strict=True))
    reward = torch.tensor(step_rewards(run, step)).view(-1, config.num_generations)
    advantage = (
        (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
    ).flatten()
    assert advantage.abs().max() > 0.5
    with torch.no_grad():
        old = [eager_logprob(policy, *pair, temperature) for pair in pairs]
        ref = [eager_logprob(reference, *pair, temperature) for pair in pairs]
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0
    )
    for _ in range(updates):
        optimizer.zero_grad()
        losses = []
        for i, pair in enumerate(pairs):
            logprob = eager_logprob(policy, *pair, temperature)
            ratio = (logprob - old[i]).exp()
            gain = torch.minimum(ratio * advantage[i], ratio.clamp(0.8, 1.2) * advantage[i])
            kl = (ref[i] - logprob).exp() - (ref[i] - logprob) - 1
            losses.append((-gain + beta * kl).mean())
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        optimizer.step()
    # The gradient of the last update. Adam's first step is +-lr whatever a gradient's size, so then the two policies
    # differ in the few weights whose gradient is nothing but rounding error.
    tolerance = 1e-5 if updates == 1 else 3e-2
    mine, theirs = (
        torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (run.policy.model, policy)
    )
    assert torch.linalg.vector_norm(mine - theirs) <= tolerance * torch.linalg.vector_norm(theirs)


def step_rewards(run: Run, step) -> list[float]:
    texts = [
        run.tokenizer.decode(ids, skip_special_tokens=True) for ids in step.rollout.completion_ids
    ]
    prompts = [run.tokenizer.decode(ids)[:3] for ids in step.rollout.prompt_ids]
    rewards = run.task.rewards(run.tokenizer.eos_token_id)["right_tokens"]
    return rewards(completions=texts, completion_ids=step.rollout.completion_ids, answer=prompts)


@pytest.mark.parametrize("objective", ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo"])
def test_micro_batches_do_not_change_the_gradient(objective):
    """The normaliser counts the whole step, whatever goes through the model at once."""
    config = replace(SMALL, objective=objective, beta=0.1, max_steps=1, max_grad_norm=1e9)
    norms = [
        train(replace(config, per_device_train_batch_size=size))[1][0].numbers["grad_norm"]
        for size in (16, 5, 1)
    ]
    assert norms[0] > 0.01
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert norms[2] == pytest.approx(norms[0], rel=1e-4)


def test_a_seed_repeats_to_the_bit_and_another_differs():
    first, second, other = (weights(train(replace(SMALL, seed=seed))[0]) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_without_kl_dropping_zero_advantages_changes_nothing():
    """beta = 0 drops them by itself: the update is that of a run which trains on every completion."""
    config = replace(SMALL, beta=0.0, max_steps=3)
    dropped, steps = train(config)
    assert min(step.numbers["frac_trained"] for step in steps) < 1, (
        "some group must be without spread"
    )
    tiny_kl = train(replace(config, beta=1e-30))[
        0
    ]  # keeps every completion; the KL itself is nothing
    assert torch.allclose(weights(dropped), weights(tiny_kl), rtol=0, atol=1e-4)


def test_dropping_zero_advantages_under_kl_is_another_update():
    config = replace(SMALL, beta=0.5, max_steps=3)
    kept, steps = train(config)
    dropped, fewer = train(replace(config, drop_zero_advantage=True))
    assert all(step.numbers["frac_trained"] == 1 for step in steps)
    assert min(step.numbers["frac_trained"] for step in fewer) < 1
    assert not torch.equal(weights(kept), weights(dropped))


def test_a_step_without_any_gradient_still_runs():
    config = replace(
        SMALL, beta=0.0, max_steps=2, temperature=1e-3
    )  # all completions of a prompt are the same
    _, steps = train(config)
    assert [step.numbers["frac_trained"] for step in steps] == [0.0, 0.0]
    assert [step.numbers["grad_norm"] for step in steps] == [0.0, 0.0]
    assert steps[0].numbers["frac_reward_zero_std"] == 1.0


def test_on_policy_numbers_are_what_they_must_be():
    _, steps = train(replace(SMALL, beta=0.04))
    first, second = (step.numbers for step in steps)
    assert first["clip_ratio/region_mean"] == 0
    assert abs(first["loss"]) < 1e-6
    assert first["kl"] == 0
    assert second["kl"] > 0
    assert first["sampling/sampling_logp_difference/max"] < 1e-5


def test_more_updates_per_batch_meet_the_clip():
    _, steps = train(replace(SMALL, num_iterations=4, learning_rate=3e-2, max_steps=1))
    assert steps[0].numbers["clip_ratio/region_mean"] > 0


def test_the_loss_is_the_mean_over_updates():
    """Four updates with a learning rate of nothing have the loss of one."""
    config = replace(SMALL, beta=0.04, learning_rate=1e-12, objective="dr_grpo", max_steps=1)
    once, often = (train(replace(config, num_iterations=n))[1][0].numbers for n in (1, 4))
    assert abs(once["loss"]) > 1e-3
    assert often["loss"] == pytest.approx(once["loss"], rel=1e-3)


def test_the_reference_follows_the_policy_if_asked():
    """After a sync the KL starts again from 0."""
    config = replace(SMALL, beta=0.1, max_steps=3)
    fixed = [step.numbers["kl"] for step in train(config)[1]]
    synced = [step.numbers["kl"] for step in train(replace(config, ref_sync_steps=2))[1]]
    assert synced[:2] == fixed[:2]
    assert fixed[2] > 0
    assert synced[2] == 0


def test_metrics_have_trls_names():
    _, steps = train(replace(SMALL, beta=0.1))
    names = """reward reward_std frac_reward_zero_std rewards/right_tokens/mean completions/mean_length
        completions/clipped_ratio kl entropy clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean grad_norm
        learning_rate loss num_tokens step_time time/generate time/score time/train"""
    assert set(names.split()) <= set(steps[0].numbers)
    tokens = [sum(s.rollout.lengths) + sum(map(len, s.rollout.prompt_ids)) for s in steps]
    assert steps[1].numbers["num_tokens"] == sum(tokens)


def test_without_a_reference_there_is_no_kl_metric():
    assert "kl" not in train(replace(SMALL, beta=0.0, max_steps=1))[1][0].numbers


def test_packed_batch_holds_exactly_the_completion_tokens():
    batch = make_batch([[5, 6], [7]], [[8, 1], [9, 9, 1]], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 8, 1], [7, 9, 9, 1]]
    assert batch.token_ids.tolist() == [8, 1, 9, 9, 1]
    assert batch.input_ids.flatten()[batch.predict + 1].tolist() == batch.token_ids.tolist()
    assert batch.cu_seqlens.tolist() == [0, 2, 5]


def test_micro_batches_cover_every_row_once_and_put_like_lengths_together():
    lengths = [5, 1, 9, 2, 7]
    groups = list(micro_batches(lengths, 2))
    assert sorted(i for group in groups for i in group) == [0, 1, 2, 3, 4]
    assert [[lengths[i] for i in group] for group in groups] == [[1, 2], [5, 7], [9]]


def test_learning_rate_courses():
    assert [learning_rate_factor("constant", s, 10, 3) for s in (0, 1, 2, 3, 9)] == [
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
    ]
    assert learning_rate_factor("linear", 3, 13, 3) == 1.0
    assert learning_rate_factor("linear", 8, 13, 3) == pytest.approx(0.5)
    assert learning_rate_factor("linear", 40, 13, 3) == 0.0
    assert learning_rate_factor("cosine", 8, 13, 3) == pytest.approx(0.5)


def test_every_objective_of_the_command_line_exists():
    from typing import get_args

    from fastgrpo.trainer.options.config import ObjectiveName

    for name in get_args(ObjectiveName):
        objective = make_objective(replace(SMALL, objective=name, beta=0.02))
        in_loss = 0.0 if name == "ppo" else 0.02  # PPO's is in the reward
        assert (objective.name, objective.kl.beta) == (name, in_loss)
    high = make_objective(replace(SMALL, objective="dapo", epsilon=0.1, epsilon_high=0.3))
    assert high.positive[1] == pytest.approx(1.3)
    assert high.negative[0] == pytest.approx(0.9)

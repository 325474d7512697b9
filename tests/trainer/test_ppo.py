"""PPO against the paper's Eq. 1 and 2 written out, and what belongs to it: the value model's life, options, metrics."""

import copy
import random
from dataclasses import replace

import pytest
import torch

from fastgrpo.trainer.microbatch import Portion, split
from fastgrpo.trainer.policy import Policy
from fastgrpo.trainer.ppo import appraise
from fastgrpo.trainer.setup import Run
from fastgrpo.trainer.state import State
from fastgrpo.trainer.tasks.copy_digits import CopyDigits
from fastgrpo.trainer.tasks.story import Story
from fastgrpo.trainer.train import grpo
from tests.trainer.conftest import tiny_llama
from tests.trainer.test_train import SMALL, eager_logprob, make_run, step_rewards

PPO = replace(SMALL, objective="ppo", beta=0.3, max_steps=1)


def start(config):
    """A run whose value model says something from the beginning."""
    run = make_run(config)
    state = State(run)
    torch.manual_seed(3)
    torch.nn.init.normal_(state.critic.head.weight, std=0.3)
    torch.nn.init.constant_(state.critic.head.bias, 0.1)
    return run, state


def eager_value(critic, prompt, completion):
    hidden = critic.model(torch.tensor([prompt + completion]))[0][0, len(prompt) - 1 : -1]
    return critic.head(hidden)[:, 0]


def eager_gae(reward, value, gamma, lam):
    advantage, later = torch.zeros_like(reward), 0.0
    for t in reversed(range(len(reward))):
        after = value[t + 1] if t + 1 < len(reward) else 0.0
        delta = reward[t] + gamma * after - value[t]
        advantage[t] = later = delta + gamma * lam * later
    return advantage


def eager_gradient(run, policy, reference, critic, step, updates):
    """The gradient of the last update, clipped: Eq. 1 with Eq. 2, and the clipped value loss."""
    c = run.config
    pairs = list(zip(step.rollout.prompt_ids, step.rollout.completion_ids, strict=True))
    with torch.no_grad():
        old = [eager_logprob(policy, *pair, c.temperature) for pair in pairs]
        value = [eager_value(critic, *pair) for pair in pairs]
        advantage, returns = [], []
        for i, earned in enumerate(step_rewards(run, step)):
            reward = torch.zeros_like(old[i])
            if c.beta:
                reward -= c.beta * (old[i] - eager_logprob(reference, *pairs[i], c.temperature))
            reward[-1] += earned
            advantage.append(eager_gae(reward, value[i], c.gamma, c.lam))
            returns.append(advantage[-1] + value[i])
        if c.scale_rewards != "none":
            flat = torch.cat(advantage)
            advantage = [(a - flat.mean()) / (flat.var() + 1e-8).sqrt() for a in advantage]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(policy.parameters()), "lr": c.learning_rate},
            {"params": list(critic.parameters()), "lr": 10 * c.learning_rate},
        ],
        betas=(0.9, 0.99),
        weight_decay=0,
    )
    parameters = [*policy.parameters(), *critic.parameters()]
    for _ in range(updates):
        optimizer.zero_grad()
        losses, misses = [], []
        for i, pair in enumerate(pairs):
            ratio = (eager_logprob(policy, *pair, c.temperature) - old[i]).exp()
            a = advantage[i]
            losses.append(-torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean())
            v = eager_value(critic, *pair)
            near = value[i] + (v - value[i]).clamp(-c.cliprange_value, c.cliprange_value)
            misses.append(torch.maximum((v - returns[i]) ** 2, (near - returns[i]) ** 2) / 2)
        value_loss = torch.cat(misses).mean()
        (torch.stack(losses).mean() + c.vf_coef * value_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, c.max_grad_norm)
        optimizer.step()
    return torch.cat([p.grad.flatten() for p in parameters]), norm.item(), value_loss.item()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 3},
        {"beta": 0.0, "scale_rewards": "none", "lam": 1.0},
        {"gamma": 0.9, "lam": 0.5, "temperature": 0.7, "max_grad_norm": 0.05},
        {"num_iterations": 2, "vf_coef": 1.0, "cliprange_value": 0.02},
        {"num_generations": 1, "prompts_per_step": 16},
    ],
    ids=str,
)
def test_the_gradient_is_that_of_equations_1_and_2(changes):
    config = replace(PPO, learning_rate=2e-3, **changes)
    run, state = start(config)
    torch.manual_seed(4)
    for parameter in [] if state.reference is None else state.reference.parameters():
        parameter.add_(
            0.1 * torch.randn_like(parameter)
        )  # so that there is a KL from the beginning
    policy, critic = copy.deepcopy(run.policy.model), copy.deepcopy(state.critic)
    reference = copy.deepcopy(getattr(state.reference, "model", None))
    step = next(grpo(run, state))
    theirs, norm, value_loss = eager_gradient(
        run, policy, reference, critic, step, config.num_iterations
    )
    mine = torch.cat([p.grad.flatten() for p in state.named_parameters().values()])
    assert theirs.abs().max() > 1e-3
    # Adam's first step is +-lr whatever a gradient's size: where it is rounding error, weights come to differ.
    tolerance = 1e-5 if config.num_iterations == 1 else 3e-2
    assert torch.linalg.vector_norm(mine - theirs) <= tolerance * torch.linalg.vector_norm(theirs)
    assert step.numbers["grad_norm"] == pytest.approx(norm, rel=tolerance)
    if config.num_iterations == 1:
        assert step.numbers["loss/value_avg"] == pytest.approx(value_loss, rel=1e-5)
    else:
        assert 0 < step.numbers["val/clipfrac_avg"] < 1


def test_process_supervision_rewards_the_ends_of_lines(tokenizer):
    """Advantages then follow from rewards in the middle of the completion."""

    class Lines(Story):
        def line_rewards(self, problem, lines):
            return [float(i + 1) for i in range(len(lines))]

    config = replace(
        PPO, job="story", supervision="process", beta=0.0, lam=1.0, scale_rewards="none",
        max_completion_length=30,
    )  # fmt: skip
    model = tiny_llama(tokenizer, hidden_size=16, intermediate_size=24)
    run = Run(config, Lines(), tokenizer, Policy(model), torch.device("cpu"))
    state = State(run)
    seen = {}

    def look():
        for batch in state.scored.portions[0].batches:
            for ids, part in zip(
                batch.tokens.token_ids.split(batch.tokens.cu_seqlens.diff().tolist()),
                batch.advantage.split(batch.tokens.cu_seqlens.diff().tolist()),
                strict=True,
            ):
                seen[tuple(ids.tolist())] = part

    step = next(grpo(run, state, look))
    newline = tokenizer.convert_tokens_to_ids("\n")
    several = 0
    for ids, cut in zip(step.rollout.completion_ids, step.rollout.truncated, strict=True):
        reward, number = torch.zeros(len(ids)), 0
        for t, token in enumerate(ids):
            if token == newline or t + 1 == len(ids):
                number += 1
                reward[t] = 0.0 if cut and t + 1 == len(ids) else number
        several += number > 1
        assert torch.allclose(seen[tuple(ids)], reward.flip(0).cumsum(0).flip(0))  # values are 0
    assert several


@pytest.mark.parametrize("scale", ["none", "batch"])
def test_a_completion_without_a_reward_trains_nothing(scale):
    """Its advantage is 0 and its values have nothing to learn; those of others are as if it were not there."""
    run, state = start(replace(PPO, scale_rewards=scale))
    rollout = state.sample(run.task.sample("train", random.Random(0), 4))
    reward = torch.arange(16.0)
    reward[3] = torch.nan

    def appraised(rows):
        parts = split(
            rollout,
            reward,
            size=1,
            rows=rows,
            drop_zero_advantage=False,
            pad_id=0,
            device=run.device,
        )
        names = [str(batch.advantage.item()) for batch in parts]
        for batch in parts:
            batch.ref_logprob = state.reference(batch.tokens)
        appraise(state, [Portion(parts, torch.tensor(16.0))])
        return dict(zip(names, parts, strict=True))

    everyone, others = appraised(range(16)), appraised([i for i in range(16) if i != 3])
    unscored = everyone["nan"]
    assert unscored.advantage.eq(0).all()
    assert torch.equal(unscored.returns, unscored.value)
    for name, batch in others.items():
        assert torch.equal(batch.returns, everyone[name].returns)
        assert torch.allclose(batch.advantage, everyone[name].advantage, rtol=1e-5, atol=1e-6)


def test_the_value_model_learns_what_is_earned():
    """Once the first token is there the reward is certain, and a value model can explain the returns after it."""

    class FirstToken(CopyDigits):
        def rewards(self, eos_id):
            return {"first": lambda completion_ids, **_: [ids[0] % 2 for ids in completion_ids]}

    config = replace(
        PPO, beta=0.0, max_steps=40, prompts_per_step=16, learning_rate=1e-3,
        lr_scheduler_type="constant", cliprange_value=None,
    )  # fmt: skip
    run = make_run(config)
    run = Run(config, FirstToken(), run.tokenizer, run.policy, run.device)
    numbers = [step.numbers for step in grpo(run)]
    assert numbers[0]["value/mean"] == 0
    assert numbers[0]["value/explained_variance"] == pytest.approx(0, abs=1e-6)
    late = [n["value/explained_variance"] for n in numbers[-10:]]
    assert sum(late) / 10 > 0.25
    assert numbers[-1]["value/mean"] == pytest.approx(numbers[-1]["reward"], abs=0.2)


def test_metrics_have_trls_names():
    run = make_run(replace(PPO, max_steps=3))
    first, *_, last = [step.numbers for step in grpo(run)]
    names = """loss/value_avg val/clipfrac_avg objective/kl objective/non_score_reward objective/rlhf_reward value/mean
        value/explained_variance kl loss reward entropy clip_ratio/region_mean grad_norm"""
    assert set(names.split()) <= set(first)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)  # the policy is the reference
    assert last["objective/non_score_reward"] == pytest.approx(-0.3 * last["objective/kl"])
    total = last["reward"] + last["objective/non_score_reward"]
    assert last["objective/rlhf_reward"] == pytest.approx(total, abs=1e-5)
    assert first["sampling/sampling_logp_difference/max"] < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lam": 1.5}, r"lam must be in \[0, 1\], got 1.5"),
        ({"gamma": -0.1}, r"gamma must be in \[0, 1\]"),
        ({"vf_coef": -1.0}, "vf[_-]coef must be at least 0"),
        ({"cliprange_value": 0.0}, "cliprange[_-]value must be above 0"),
        ({"scale_rewards": "group"}, "scale[_-]rewards belongs to objectives that compare"),
        ({"drop_zero_advantage": True}, "drop[_-]zero[_-]advantage must be off under"),
        ({"epsilon": 0.1, "epsilon_high": 0.3}, "epsilon[_-]high does not belong to"),
        ({"objective": "grpo", "lam": 0.9}, "lam belongs to --objective ppo, got 0.9"),
        ({"objective": "dapo", "cliprange_value": None}, "cliprange[_-]value belongs to"),
    ],
    ids=str,
)
def test_options_that_cannot_be_meant(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(PPO, **changes)

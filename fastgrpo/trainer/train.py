"""Group Relative Policy Optimization on one page: Algorithm 1 of DeepSeekMath (Shao et al. 2024, arXiv:2402.03300).

    for step = 1 ... max_steps:
        sample questions, and G completions of each from the policy
        reward every completion; compared with the others of its question, that is its advantage
        for iteration = 1 ... mu: one update of the policy on the GRPO objective (Eq. 3)
        now and then (iterative GRPO): the policy becomes the reference

The loss is computed inside the policy's forward (`policy.py`) by the package's own ops. In the first update the policy
that is trained is the policy that sampled: the ratio is exactly 1 and no pass for old log-probabilities is needed. Its
log-probabilities are kept as the old ones of later updates.
"""

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fastgrpo.trainer.algorithm import learning_rate_factor, make_advantage, make_objective
from fastgrpo.trainer.clock import Clock
from fastgrpo.trainer.microbatch import denominator, split
from fastgrpo.trainer.rewards import score
from fastgrpo.trainer.rollout import Rollout
from fastgrpo.trainer.setup import Run
from fastgrpo.trainer.tally import Tally, length_numbers, reward_numbers
from fastgrpo.trainer.text import decode, encode_prompts


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did."""

    completions: list[str]
    rollout: Rollout
    numbers: dict[str, float]


def grpo(run: Run) -> Iterator[Step]:
    """Trains `run.policy` in place; yields after every step."""
    config, policy, task, tokenizer = run.config, run.policy, run.task, run.tokenizer
    objective = make_objective(config)
    reference = copy.deepcopy(policy).requires_grad_(False) if config.beta > 0 else None
    rewards = task.rewards(tokenizer.eos_token_id)
    sampler = run.sampler(config.seed)
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )
    num_tokens = 0
    for step in range(config.max_steps):
        clock, tally = Clock(), Tally()
        rng = random.Random(
            f"grpo {config.seed} {step}"
        )  # a step's questions depend on nothing else
        problems = task.sample("train", rng, config.prompts_per_step)
        rollout = sampler.sample(
            encode_prompts(tokenizer, [problem.prompt for problem in problems]),
            num_samples=config.num_generations,
            max_new_tokens=config.max_completion_length,
            temperature=config.temperature,
        )
        clock.lap("generate")

        completions = decode(tokenizer, rollout.completion_ids)
        asked = [problem for problem in problems for _ in range(config.num_generations)]
        reward = score(rewards, asked, completions, rollout.completion_ids)
        advantage = make_advantage(reward, config)
        clock.lap("score")

        normalizer = denominator(rollout, objective, run.device)
        batches = split(
            rollout,
            advantage.advantage,
            size=config.per_device_train_batch_size,
            drop_zero_advantage=config.drop_zero_advantage or config.beta == 0,
            pad_id=tokenizer.pad_token_id,
            device=run.device,
        )
        if reference is not None:
            with torch.no_grad():
                for batch in batches:
                    batch.ref_logprob = reference(batch.tokens)
            clock.lap("reference")

        factor = learning_rate_factor(
            config.lr_scheduler_type, step, config.max_steps, config.warmup_steps
        )
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        for _ in range(config.num_iterations):
            optimizer.zero_grad(set_to_none=False)  # without any gradient Adam still moves on
            for batch in batches:
                result = policy(
                    batch.tokens,
                    advantage=batch.advantage,
                    old_logprob=batch.old_logprob,
                    ref_logprob=batch.ref_logprob,
                    objective=objective,
                    normalizer=normalizer,
                )
                result.loss.backward()
                tally.add(result, batch)
                if batch.old_logprob is None:
                    batch.old_logprob = result.logprob
            grad_norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            optimizer.step()
        if (
            reference is not None
            and config.ref_sync_steps
            and (step + 1) % config.ref_sync_steps == 0
        ):
            reference.load_state_dict(policy.state_dict())
        sampler.refresh()
        clock.lap("train")

        num_tokens += sum(rollout.lengths) + sum(map(len, rollout.prompt_ids))
        trained = sum(len(batch.advantage) for batch in batches)
        yield Step(
            completions,
            rollout,
            reward_numbers(list(rewards), reward, advantage, config.num_generations)
            | length_numbers(rollout)
            | tally.losses(with_kl=reference is not None)
            | {
                "grad_norm": float(grad_norm),
                "learning_rate": config.learning_rate * factor,
                "frac_trained": trained / len(completions),
                "num_tokens": num_tokens,
                "step_time": clock.total,
            }
            | {f"time/{name}": seconds for name, seconds in clock.laps.items()},
        )

"""Group Relative Policy Optimization on one page: Algorithm 1 of DeepSeekMath (Shao et al. 2024, arXiv:2402.03300).

    for step = 1 ... max_steps:
        sample questions, and G completions of each from the policy
        reward every completion; compared with the others of its question, that is its advantage
        for iteration = 1 ... mu: one update of the policy on the GRPO objective (Eq. 3)
        now and then (iterative GRPO): the policy becomes the reference, and rewards that learn are trained further

Under PPO (Eq. 1) a value model says what a token's advantage is (`ppo.py`); all else is the same.

The loss is computed inside the policy's forward (`policy.py`) by the package's own ops. In the first update the policy
that is trained is the policy that sampled: the ratio is exactly 1 and no pass for old log-probabilities is needed. Its
log-probabilities are kept as the old ones of later updates.
"""

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fastgrpo.objective import Objective
from fastgrpo.trainer.algorithm import learning_rate_factor, make_advantage, make_objective
from fastgrpo.trainer.clock import Clock
from fastgrpo.trainer.data.text import decode
from fastgrpo.trainer.microbatch import Portion
from fastgrpo.trainer.passes import backward, skip_or_stop
from fastgrpo.trainer.portions import divide
from fastgrpo.trainer.ppo import appraise
from fastgrpo.trainer.process import reward_lines
from fastgrpo.trainer.sampling.rollout import Rollout
from fastgrpo.trainer.setup import Run
from fastgrpo.trainer.state import Scored, State, grad_norm_
from fastgrpo.trainer.tally import length_numbers, reward_numbers


@dataclass(frozen=True, slots=True)
class Step:
    """What one step did."""

    completions: list[str]
    rollout: Rollout
    portions: list[Portion]
    numbers: dict[str, float]


def grpo(
    run: Run, state: State | None = None, safe_point: Callable[[], None] = lambda: None
) -> Iterator[Step]:
    """Trains `run.policy` in place; yields after every step. At each `safe_point` the state can be saved."""
    config = run.config
    objective = make_objective(config)
    state = state or State(run)
    while state.step < config.max_steps:
        clock = Clock()
        if state.scored is None:
            state.scored = sample(state, objective, clock)
            safe_point()
        scored = state.scored
        factor = learning_rate_factor(
            config.lr_scheduler_type, state.step, config.max_steps, config.warmup_steps
        )
        state.set_learning_rate(factor)
        while scored.update < state.updates:
            update(state, scored, objective)
            clock.lap("train")
            safe_point()
        if config.ref_sync_steps and (state.step + 1) % config.ref_sync_steps == 0:
            state.renew_reference()
            state.refit_rewards()
            clock.lap("score")
        state.publish()
        state.num_tokens += scored.num_tokens
        state.scored = None
        state.step += 1
        clock.lap("train")
        numbers = {
            "grad_norm": scored.grad_norm,
            "learning_rate": config.learning_rate * factor,
            "frac_trained": scored.num_trained / sum(state.counts),
            "num_tokens": state.num_tokens,
            "skipped_updates": scored.skipped,
            "step_time": clock.total,
        }
        losses = scored.tally.over_ranks(run.ranks).losses(with_kl=state.reference is not None)
        times = {f"time/{name}": seconds for name, seconds in clock.laps.items()}
        numbers = scored.numbers | losses | numbers | times
        yield Step(scored.completions, scored.rollout, scored.portions, numbers)


def sample(state: State, objective: Objective, clock: Clock) -> Scored:
    """Questions, completions, rewards, advantages, and what the loss needs to know of other policies."""
    run, config = state.run, state.run.config
    rng = random.Random(f"grpo {config.seed} {state.step}")  # questions depend on nothing else
    problems = run.task.sample("train", rng, config.prompts_per_step)
    rollout = state.sample(problems)
    clock.lap("generate")

    asked = [problems[i] for k in sorted(state.streams) for i in state.questions(k)]
    asked = [problem for problem in asked for _ in range(config.num_generations)]
    completions = decode(run.tokenizer, rollout.completion_ids)
    mine = run.rewards.score(asked, completions, rollout.completion_ids)
    state.remember(asked, completions, rollout, mine)
    reward = run.ranks.rows(mine, state.counts)
    facts = [rollout.lengths, rollout.truncated, [len(ids) for ids in rollout.prompt_ids]]
    lengths, truncated, prompt = run.ranks.rows(torch.tensor(facts).T, state.counts).T.tolist()
    advantage = make_advantage(reward, config)
    worth, numbers = state.share_of(advantage), dict[str, float]()
    if state.critic is not None:
        worth = run.rewards.total(mine)
    if config.supervision == "process":
        lines = reward_lines(run.task, run.tokenizer, asked, rollout)
        numbers["step_reward"] = run.ranks.mean(lines.reward)
        worth = lines.per_token() if state.critic else lines.advantage(config.num_generations)
    clock.lap("score")

    drop = config.drop_zero_advantage or (config.beta == 0 and state.critic is None)
    portions = divide(state, rollout, objective, worth, drop)
    with torch.no_grad():
        for number, portion in enumerate(portions):
            for batch in portion.batches:
                if state.reference is not None:
                    batch.ref_logprob = state.reference(batch.tokens)
                # Of a later portion: by then the policy will not be the one that sampled.
                if number or objective.correction:
                    batch.old_logprob = run.policy(batch.tokens)
    if state.critic is not None:
        numbers |= appraise(state, portions)
    state.settle()
    if any((state.reference, state.critic, len(portions) > 1, objective.correction)):
        clock.lap("reference")
    return Scored(
        rollout,
        completions,
        portions,
        reward_numbers(run.rewards, reward, advantage, config.num_generations)
        | length_numbers(lengths, truncated)
        | numbers,
        num_trained=int(run.ranks.sum(torch.tensor(sum(portion.size for portion in portions)))),
        num_tokens=sum(lengths) + sum(prompt),
    )


def update(state: State, scored: Scored, objective: Objective) -> None:
    """One step of the optimizer on one portion of the batch."""
    portion = scored.portions[scored.update % len(scored.portions)]
    state.optimizer.zero_grad(set_to_none=False)  # without any gradient Adam still moves on
    tally = backward(state, portion, objective)
    scored.grad_norm = grad_norm_(state.named_parameters().values(), state.run.config.max_grad_norm)
    scored.update += 1
    scored.tally.merge(tally)
    if math.isfinite(scored.grad_norm) and math.isfinite(float(tally.loss)):
        state.optimizer.step()
        state.bad_updates = 0
    else:
        skip_or_stop(state, scored)

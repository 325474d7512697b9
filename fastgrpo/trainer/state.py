"""Everything that changes while GRPO runs: what a checkpoint has to hold, no more and no less."""

import copy
import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fastgrpo.advantages import GroupAdvantage
from fastgrpo.trainer.adapter import WithoutAdapter, is_adapted, plain_copy, write_merged
from fastgrpo.trainer.critic import LEARNING_RATE_FACTOR, Critic
from fastgrpo.trainer.data.text import prompt_ids
from fastgrpo.trainer.microbatch import Portion
from fastgrpo.trainer.options.settings import SettingsError
from fastgrpo.trainer.parallel.distributed import full
from fastgrpo.trainer.rewards.replay import Replay
from fastgrpo.trainer.rewards.scoring import columns_of, records_of
from fastgrpo.trainer.sampling.rollout import Rollout, SamplerError, check, join
from fastgrpo.trainer.setup import Run
from fastgrpo.trainer.tally import Tally
from fastgrpo.trainer.tasks.base import Problem


@dataclass(slots=True)
class Scored:
    """A sampled batch with its rewards, and how far training on it has come."""

    rollout: Rollout  # of this rank
    completions: list[str]
    portions: list[Portion]
    numbers: dict[str, float]  # metrics of rewards and lengths, all ranks included
    num_trained: int  # completions that training does not leave out
    num_tokens: int
    update: int = 0
    tally: Tally = field(default_factory=Tally)
    grad_norm: float = 0.0
    skipped: int = 0


class State:
    """The networks, their optimizer, the sampler's random numbers, what rewards learn from, the place in the run."""

    def __init__(self, run: Run) -> None:
        config, ranks = run.config, run.ranks
        self.run = run
        self.step = 0
        self.num_tokens = 0
        self.bad_updates = 0  # in a row
        self.micro_batch_size = config.per_device_train_batch_size
        self.scored: Scored | None = None
        self.replay = Replay()
        run.sampled = to_sample_from(run)
        self.reference: nn.Module | WithoutAdapter | None = None
        if config.beta > 0 and is_adapted(run.policy.model):
            self.reference = WithoutAdapter(run.policy)
        elif config.beta > 0:
            self.reference = copy.deepcopy(run.policy).requires_grad_(False)
            if ranks.kind == "fsdp2":
                ranks.wrap(self.reference)
        self.critic = Critic(run.policy).eval() if config.objective == "ppo" else None
        # What is called to train; `run.policy` and `critic` hold the same weights.
        self.model = ranks.wrap(run.policy)
        self.value_model = None if self.critic is None else ranks.wrap(self.critic)
        trained = [run.policy] if self.critic is None else [run.policy, self.critic]
        self.optimizer = torch.optim.AdamW(
            [{"params": [p for p in net.parameters() if p.requires_grad]} for net in trained],
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
        )
        self.sampler = run.sampler(config.seed, ranks)
        count = config.sampling_streams or ranks.world_size
        if count < ranks.world_size:
            raise SettingsError(
                f"--sampling-streams must be at least the number of processes ({ranks.world_size}), got {count}"
            )
        self.num_streams = count
        self.streams = {k: self._first_stream(k) for k in ranks.span(count)}

    def _first_stream(self, number: int) -> Tensor:
        seed = self.run.config.seed
        if number:
            text = f"stream {number} of {seed}".encode()
            seed = int.from_bytes(hashlib.sha256(text).digest()[:4], "big")
        return torch.Generator(self.run.device).manual_seed(seed).get_state()

    def others(self) -> dict[str, nn.Module]:
        """The networks beside the policy, by name. A reference that is the policy without its adapter is none."""
        both = {"reference": self.reference, "critic": self.critic}
        return {name: net for name, net in both.items() if isinstance(net, nn.Module)}

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained, in the optimizer's order."""
        named = dict(self.run.policy.named_parameters())
        if self.critic is not None:
            named |= {f"critic.{name}": p for name, p in self.critic.named_parameters()}
        return {name: p for name, p in named.items() if p.requires_grad}

    def set_learning_rate(self, factor: float) -> None:
        """A share of the peak, of which the value model has a multiple."""
        rate = self.run.config.learning_rate * factor
        policy, *critic = self.optimizer.param_groups
        policy["lr"] = rate
        for group in critic:
            group["lr"] = rate * LEARNING_RATE_FACTOR

    @property
    def updates(self) -> int:
        """Updates of the policy per step."""
        return self.run.config.num_iterations * self.run.config.steps_per_generation

    @property
    def counts(self) -> list[int]:
        """Completions of a step on each rank."""
        config, ranks = self.run.config, self.run.ranks
        spans = [ranks.span(self.num_streams, part=r) for r in range(ranks.world_size)]
        prompts = [sum(len(self.questions(k)) for k in span) for span in spans]
        return [n * config.num_generations for n in prompts]

    def questions(self, stream: int) -> range:
        """Which of a step's questions a stream of random numbers serves."""
        return self.run.ranks.span(self.run.config.prompts_per_step, self.num_streams, stream)

    def sample(self, problems: list[Problem]) -> Rollout:
        """Completions of this rank's share of a step's questions.

        Raises:
            SamplerError: The sampler of any rank could not go on.
        """
        rollout, problem = None, ""
        try:
            rollout = self._sample(problems)
        except SamplerError as error:
            problem = str(error)
        failed = [told["problem"] for told in self.run.ranks.share({"problem": problem})]
        if rollout is None or any(failed):
            raise SamplerError(next(filter(None, failed)))
        return rollout

    def _sample(self, problems: list[Problem]) -> Rollout:
        config, parts = self.run.config, []
        for stream in sorted(self.streams):
            self.sampler.rng_state = self.streams[stream]
            asked = [problems[i] for i in self.questions(stream)]
            rollout = self.sampler.sample(
                prompt_ids(self.run.tokenizer, asked),
                num_samples=config.num_generations,
                max_new_tokens=config.max_completion_length,
                temperature=config.temperature,
            )
            vocabulary = self.run.policy.model.config.vocab_size
            parts.append(check(rollout, len(asked) * config.num_generations, vocabulary))
            self.streams[stream] = self.sampler.rng_state
        return join(parts)

    @torch.no_grad()
    def publish(self) -> None:
        """Lets the sampler draw from the policy as it is now."""
        if is_adapted(self.run.policy.model):
            write_merged(self.run.policy.model, self.run.sampled)
        elif self.run.sampled is not self.run.policy.model:
            weights = self.run.policy.model.state_dict()
            for name, tensor in self.run.sampled.state_dict().items():
                tensor.copy_(full(weights[name]))
        self.sampler.refresh()

    def settle(self) -> None:
        """After passes without a backward: FSDP2 would leave what is gathered last on every rank."""
        modules: list[Any] = [self.reference, self.model, self.value_model]
        for module in modules:
            if isinstance(module, FSDPModule):
                module.reshard()

    @torch.no_grad()
    def renew_reference(self) -> None:
        """Iterative GRPO: the policy becomes the reference."""
        if isinstance(self.reference, nn.Module):
            pairs = zip(self.reference.parameters(), self.run.policy.parameters(), strict=True)
            for theirs, ours in pairs:
                theirs.copy_(ours)

    def remember(
        self, asked: Sequence[Problem], completions: Sequence[str], rollout: Rollout, reward: Tensor
    ) -> None:
        """Keeps scored completions of all ranks for rewards that learn, if there are any."""
        rewards = self.run.rewards
        if not rewards.learning:
            return
        given = dict(zip(rewards.functions, reward.T.tolist(), strict=True))
        columns = columns_of(asked, completions, rollout.completion_ids)
        for told in self.run.ranks.share({"records": records_of(columns, given)}):
            self.replay.fresh += told["records"]

    def refit_rewards(self) -> None:
        """Iterative GRPO: rewards that learn are trained on this iteration's completions and some of earlier ones."""
        if self.run.rewards.learning:
            rng = random.Random(f"replay {self.run.config.seed} {self.step}")
            self.run.rewards.refit(*self.replay.turn(rng))

    def share_of(self, advantage: GroupAdvantage) -> Tensor:
        """This rank's advantages out of those of the whole step."""
        before = sum(self.counts[: self.run.ranks.rank])
        return advantage.advantage[before : before + self.counts[self.run.ranks.rank]]


def to_sample_from(run: Run) -> nn.Module:
    """The model that samplers read: the policy's own, unless that is sharded, adapted, or computes in bfloat16."""
    model: nn.Module = run.policy.model
    if is_adapted(model):
        copied = plain_copy(model)
    elif run.ranks.kind == "fsdp2" or run.policy.bf16:
        copied = copy.deepcopy(model).requires_grad_(False)
    else:
        return model
    return copied.to(torch.bfloat16) if run.policy.bf16 else copied


def grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scales gradients down to `max_norm`; returns their norm before."""
    return float(full(nn.utils.clip_grad_norm_(parameters, max_norm)))

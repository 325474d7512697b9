"""Sampling by vLLM servers: prompts divided among them, weights renewed after every step, and proof that they were.

Weights travel through a folder that the servers can read. After every renewal each server completes fixed prompts, and
the policy scores the same tokens: a server that still samples from other weights ends the run instead of training on
what another policy has written.
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastgrpo.trainer.parallel.distributed import Ranks
from fastgrpo.trainer.sampling.rollout import Rollout, SamplerError
from fastgrpo.trainer.sampling.vllm_server import Completion, VLLMServer

REQUESTS_AT_ONCE = 64  # per server; each is the samples of one prompt
PROBE_TOKENS, PROBE_SEED = 16, 0
PROBE_TOLERANCE = 0.1
"""Largest mean |log-probability of the server - of the policy| over the probe's tokens. A bfloat16 server differs from
a float32 policy by a hundredth or two."""
PROBE_MOVED = 1e-3
"""Mean change of the policy's log-probabilities that a server cannot have failed to notice. float32 arithmetic alone
moves them by 1e-6."""
A = TypeVar("A")
R = TypeVar("R")


class Probe(NamedTuple):
    """What a server answered, and what the policy gives to the same tokens."""

    token_ids: list[list[int]]
    served: Tensor
    policy: Tensor


class VLLMSampler:
    """Completions of stock vLLM servers, behind the protocol of all samplers.

    Every prompt is a request with a seed of its own, so the same `rng_state` asks for the same draws; how far a server
    keeps to that is its affair (batching changes the rounding of its logits).
    """

    name = "vllm"

    def __init__(
        self,
        model: nn.Module,
        servers: Sequence[VLLMServer],
        *,
        eos_id: int,
        seed: int,
        temperature: float,  # of training: what probes are sampled at
        probes: Sequence[Sequence[int]],  # prompts
        folder: str
        | None = None,  # where the servers can read; None: a temporary folder of this machine
        ranks: Ranks | None = None,  # those that renew the weights together
    ) -> None:
        self.model: Any = model
        self.servers = servers
        self.eos_id = eos_id
        self.temperature = temperature
        self.probes = probes
        self.ranks = ranks or Ranks()
        device = next(model.parameters()).device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.seen: dict[str, Probe] = {}  # by server, as of the last time that its answer changed
        self.version = 0
        self._folder = None
        if self.ranks.is_main:  # removed with the sampler
            self._folder = tempfile.TemporaryDirectory(prefix="weights-", dir=folder)
        self.refresh()

    @property
    def rng_state(self) -> Tensor:
        """State of the generator behind the seeds of the requests."""
        return self.generator.get_state()

    @rng_state.setter
    def rng_state(self, state: Tensor) -> None:
        self.generator.set_state(state)

    def refresh(self) -> None:
        """Gives the servers the policy's present weights, and checks that they use them. Every rank has to call this.

        Raises:
            SamplerError: A server did not take them.
        """
        problem = ""
        if self.ranks.is_main:
            try:
                self._publish()
            except SamplerError as error:
                problem = str(error)
        problem = self.ranks.share({"problem": problem})[0]["problem"]
        if problem:
            raise SamplerError(problem)

    def _publish(self) -> None:
        assert self._folder is not None
        # A name of its own for each version: no cache on the way can give an earlier one.
        folder = Path(self._folder.name).resolve() / f"version-{self.version}"
        self.version += 1
        self.model.save_pretrained(folder)
        try:
            self._at_once(lambda server: server.load(folder), self.servers)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        for server in self.servers:
            self._check(server)

    @torch.no_grad()
    def _check(self, server: VLLMServer) -> None:
        """Compares log-probabilities of a fixed continuation of fixed prompts."""
        asked = [
            server.complete(
                prompt,
                num_samples=1,
                max_new_tokens=PROBE_TOKENS,
                temperature=self.temperature,
                seed=PROBE_SEED,
                stop_ids=[self.eos_id],
            )[0]
            for prompt in self.probes
        ]
        ids = [completion.token_ids for completion in asked]
        served = torch.cat([completion.logprob for completion in asked])
        pairs = list(zip(self.probes, ids, strict=True))
        policy = torch.cat([self._score(prompt, row, self.temperature) for prompt, row in pairs])
        gap = float((served - policy).abs().mean())
        if not gap <= PROBE_TOLERANCE:
            plain = torch.cat([self._score(prompt, row, 1.0) for prompt, row in pairs])
            raise SamplerError(
                f"{server.url} does not sample from the policy: after new weights (version {self.version - 1}) its "
                f"log-probabilities differ from the policy's by {gap:.3g} in the mean, more than {PROBE_TOLERANCE:g}. "
                + (
                    "It reports them at temperature 1: start it with --logprobs-mode processed_logprobs."
                    if float((served - plain).abs().mean()) < min(gap / 4, PROBE_TOLERANCE)
                    else "Its weights are stale, or it serves another model or a quantized one."
                )
            )
        last, now = self.seen.get(server.url), Probe(ids, served, policy)
        if last is None or last.token_ids != ids or not torch.equal(last.served, served):
            self.seen[server.url] = now
        elif (moved := float((policy - last.policy).abs().mean())) > PROBE_MOVED:
            raise SamplerError(
                f"{server.url} has stale weights: the policy's log-probabilities of a fixed text have moved by "
                f"{moved:.3g} in the mean, and the server's answer is the same to the last bit."
            )

    def _score(self, prompt: Sequence[int], completion: list[int], temperature: float) -> Tensor:
        """The policy's log-probabilities of a completion, [length] on the CPU."""
        ids = torch.tensor([[*prompt, *completion]], device=self.generator.device)
        logits = self.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        logprob = torch.log_softmax(logits / temperature, -1)
        return logprob.gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu()

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        pause_ids: Sequence[int] = (),
    ) -> Rollout:
        """See `Sampler.sample`.

        Raises:
            SamplerError: A server failed, or answered with something else than what was asked for.
        """
        place = self.generator.device
        seeds = torch.randint(1 << 31, (len(prompts),), generator=self.generator, device=place)
        distinct = num_samples if temperature > 0 else 1  # vLLM refuses several greedy ones

        def ask(number: int) -> list[Completion]:
            server = self.servers[(number + self.ranks.rank) % len(self.servers)]
            return server.complete(
                prompts[number],
                num_samples=distinct,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=int(seeds[number]),
                stop_ids=[self.eos_id, *pause_ids],
            )

        answers = self._at_once(ask, range(len(prompts)))
        rows = [row for several in answers for row in several * (num_samples // distinct)]
        return Rollout(
            prompt_ids=[list(p) for p in prompts for _ in range(num_samples)],
            completion_ids=[row.token_ids for row in rows],
            logprob=[row.logprob for row in rows],
            truncated=[not row.stopped for row in rows],
        )

    def _at_once(self, call: Callable[[A], R], arguments: Sequence[A]) -> list[R]:
        """Results in order; after a failure what has not begun is not begun."""
        most = REQUESTS_AT_ONCE * len(self.servers)
        with ThreadPoolExecutor(max_workers=min(len(arguments), most)) as pool:
            pending = [pool.submit(call, argument) for argument in arguments]
            try:
                return [future.result() for future in pending]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def connect(addresses: str, timeout: float, vocabulary: int) -> list[VLLMServer]:
    """The servers at addresses with commas between.

    Raises:
        ValueError: An address that cannot be meant.
        SamplerError: One does not answer.
    """
    return [VLLMServer(url, timeout, vocabulary) for url in addresses.split(",")]

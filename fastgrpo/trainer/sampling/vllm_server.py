"""A stock vLLM server, as the sampler uses it: completions of token ids, and new weights from a folder.

It is started with `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs`. Development mode opens
`/collective_rpc`, whose `reload_weights` reads the safetensors of a folder into the running model. It opens it to
whoever reaches the port, which therefore belongs on a private network. Processed log-probabilities are those at the
sampling temperature.

Source: vLLM's documentation, "OpenAI-Compatible Server" (token ids: pull request 22587, vLLM 0.10.2) and "Layerwise
reloading" (`weights_path`: pull request 32133, vLLM 0.16).
"""

import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgrpo.trainer.sampling.http_json import JsonServer, Refused
from fastgrpo.trainer.sampling.rollout import SamplerError

NEUTRAL: dict[str, Any] = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Said in every request: a server would else take these from the model's generation_config.json."""
START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs"
PAUSE_S = 1.0


class Completion(NamedTuple):
    """One sample of a prompt."""

    token_ids: list[int]
    logprob: Tensor  # [length] float32
    stopped: bool  # at the end token or a token to pause at; else it was cut


class VLLMServer:
    """One server, found up when this returns."""

    def __init__(self, url: str, timeout: float, vocabulary: int) -> None:
        key = os.environ.get("VLLM_API_KEY")  # the name that the server reads it from
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.vocabulary = vocabulary
        self._http = JsonServer(url.strip().rstrip("/"), timeout, headers)
        self._wait()
        self.model = self._model()

    @property
    def url(self) -> str:
        """Its address."""
        return self._http.url

    def _wait(self) -> None:
        """Until it is up: loading a model takes minutes."""
        begun = time.monotonic()
        while True:
            try:
                self._http.once("GET", "/health")
                return
            except Refused as error:
                problem = str(error)
            except (OSError, ValueError) as error:
                problem = str(error) or type(error).__name__
            if time.monotonic() - begun >= self._http.timeout:
                raise SamplerError(
                    f"no vLLM server answers at {self.url} after {self._http.timeout:g} s ({problem}). "
                    f"Start it with `{START}`, or raise --vllm-server-timeout."
                )
            time.sleep(min(PAUSE_S, self._http.timeout))

    def _model(self) -> str:
        try:
            return str(self._http.get("/v1/models")["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise SamplerError(
                f"{self.url}/v1/models names no model ({error!r}): is it vLLM?"
            ) from None

    def complete(
        self,
        prompt: Sequence[int],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        stop_ids: Sequence[int],
    ) -> list[Completion]:
        """Samples of one prompt, sample i from seed + i.

        Raises:
            SamplerError: No answer, a refusal, or an answer that is not what was asked for.
        """
        answer = self._http.post(
            "/v1/completions",
            NEUTRAL
            | {
                "model": self.model,
                "prompt": list(prompt),
                "n": num_samples,
                "max_tokens": max_new_tokens,
                "temperature": temperature,
                "seed": seed,
                "logprobs": 0,  # of the sampled token alone
                "return_token_ids": True,
                "ignore_eos": True,  # the model's own list of end tokens: ours are the stop tokens
                "stop_token_ids": list(stop_ids),
            },
        )
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            found = [self._completion(choice, max_new_tokens, stop_ids) for choice in choices]
            self._require(
                len(found) == num_samples, f"{num_samples} completions expected, got {len(found)}"
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise SamplerError(
                f"{self.url}/v1/completions: the answer lacks {error}; token ids need vLLM 0.10.2 or later"
            ) from None
        return found

    def _completion(self, choice: Any, max_new_tokens: int, stop_ids: Sequence[int]) -> Completion:
        ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
        reason = choice["finish_reason"]
        n = len(ids)
        self._require(1 <= n <= max_new_tokens, f"1 to {max_new_tokens} tokens expected, got {n}")
        self._require(n == len(logprobs), f"{n} tokens have {len(logprobs)} log-probabilities")
        known = all(type(i) is int and 0 <= i < self.vocabulary for i in ids)
        self._require(known, f"a token id is outside of the {self.vocabulary} of this model")
        values = [math.nan if x is None else float(x) for x in logprobs]
        self._require(not any(x > 1e-3 for x in values), "a log-probability is above 0")
        self._require(reason in ("stop", "length"), f"a completion ended by {reason!r}")
        at_end = ids[-1] in stop_ids
        self._require(
            at_end == (reason == "stop") and not any(i in stop_ids for i in ids[:-1]),
            f"a completion ended by {reason!r}, but its end token is elsewhere",
        )
        return Completion(ids, torch.tensor(values), at_end)

    def _require(self, holds: bool, rule: str) -> None:
        if not holds:
            raise SamplerError(f"{self.url}/v1/completions gave a wrong answer: {rule}")

    def load(self, folder: Path) -> None:
        """Takes over the weights in a folder that it can read, and forgets what it has cached from those before."""
        rpc = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        try:
            self._http.post("/collective_rpc", rpc)
            told = self._http.post("/reset_prefix_cache")
        except Refused as error:
            raise SamplerError(
                f"{error}\nThe weights could not be renewed. The server has to be started with `{START}` (0.16 or "
                f"later), and be able to read {folder} (with servers elsewhere, put --output-dir on a shared disk)."
            ) from None
        if isinstance(told, dict) and told.get("success") is False:
            raise SamplerError(
                f"{self.url} could not reset its prefix cache: do others send it requests?"
            )

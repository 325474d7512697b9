"""Samplers: our own with a KV cache for Llama and Qwen models, and transformers' `generate` for every other model."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastgrpo.trainer.sampling.decoder import Decoder, KVCache, can_decode
from fastgrpo.trainer.sampling.draw import choose, draw_noise_, noise_buffer
from fastgrpo.trainer.sampling.rollout import Rollout, Sampler
from fastgrpo.trainer.sampling.static_step import StaticStep, bucket

COMPACT_AT = 0.25
"""Finished rows leave the batch once they are this share of it: copying the cache costs about two steps."""


def pad_left(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(ids [P, S], number of padding columns [P])."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
    return ids, torch.tensor([width - len(p) for p in prompts])


class KVSampler:
    """Each prompt is run once, its cache repeated per sample, and finished rows leave the batch."""

    name = "kv"

    def __init__(
        self,
        model: nn.Module,
        *,
        eos_id: int,
        pad_id: int,
        seed: int,
        compact: bool = True,
        static: bool | None = None,  # steps of fixed shape; None: on a GPU
    ) -> None:
        self.decoder = Decoder(model)
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.compact = compact
        self.device = self.decoder.embedding.device
        self.static = self.device.type == "cuda" if static is None else static
        self.generator = torch.Generator(self.device).manual_seed(seed)

    @property
    def rng_state(self) -> Tensor:
        """State of the generator behind every draw."""
        return self.generator.get_state()

    @rng_state.setter
    def rng_state(self, state: Tensor) -> None:
        self.generator.set_state(state)

    def refresh(self) -> None:
        """Take over the policy's present weights."""
        self.decoder.refresh()

    def _stepper(self, cache: KVCache) -> Callable[[Tensor], Tensor]:
        if self.static:
            return StaticStep(self.decoder, cache)
        return partial(self.decoder.step, cache=cache)

    def _size(self, remaining: int, rows: int) -> int:
        """To how many rows a batch is cut down of which so many go on."""
        if not self.compact:
            return rows
        if self.static:
            return min(rows, bucket(remaining))
        return remaining if remaining <= (1 - COMPACT_AT) * rows else rows

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        pause_ids: Sequence[int] = (),
    ) -> Rollout:
        """See `Sampler.sample`."""
        stop_ids = torch.tensor([self.eos_id, *pause_ids], device=self.device)
        ids, padding = pad_left(prompts, self.pad_id)
        logits, cache = self.decoder.prefill(
            ids.to(self.device), padding.to(self.device), max_new_tokens, num_samples
        )
        total = len(logits)
        out_ids = ids.new_full((total, max_new_tokens), self.pad_id).to(self.device)
        out_logprob = logits.new_zeros(total, max_new_tokens)
        lengths = torch.full((total,), max_new_tokens, device=self.device)
        ended = torch.zeros(total, dtype=torch.bool, device=self.device)
        rows = torch.arange(total, device=self.device)  # which row each row of the batch is
        noise = noise_buffer(total, logits) if temperature > 0 else None
        step = self._stepper(cache)
        for t in range(max_new_tokens):
            if noise is not None:  # for all rows: what a row gets must not depend on compaction
                draw_noise_(noise, self.generator)
            token_ids, logprob = choose(logits, temperature, None if noise is None else noise[rows])
            live = ~ended[rows]
            token_ids = torch.where(live, token_ids, self.pad_id)
            out_ids[rows, t] = token_ids
            out_logprob[rows, t] = torch.where(live, logprob, 0.0)
            stop = live & torch.isin(token_ids, stop_ids)
            lengths[rows] = torch.where(stop, t + 1, lengths[rows])
            ended[rows] |= stop
            live &= ~stop
            remaining = int(live.sum())
            if remaining == 0 or t + 1 == max_new_tokens:
                break
            size = self._size(remaining, len(rows))
            if size < len(rows):
                kept = live.argsort(descending=True, stable=True)[:size]  # finished ones last
                rows, token_ids, cache = rows[kept], token_ids[kept], cache.select(kept)
                step = self._stepper(cache)
            logits = step(token_ids)
        return unpad(prompts, num_samples, out_ids, out_logprob, lengths, ended)


def unpad(
    prompts: Sequence[Sequence[int]],
    num_samples: int,
    ids: Tensor,  # [B, T]
    logprob: Tensor | None,  # [B, T]
    lengths: Tensor,  # [B]
    ended: Tensor,  # [B] bool
) -> Rollout:
    """Cuts every row at its length."""
    cut = lengths.tolist()
    rows = [row[:n] for row, n in zip(ids.tolist(), cut, strict=True)]
    parts = None
    if logprob is not None:
        parts = [row[:n] for row, n in zip(logprob.cpu(), cut, strict=True)]
    return Rollout(
        prompt_ids=[list(p) for p in prompts for _ in range(num_samples)],
        completion_ids=rows,
        logprob=parts,
        truncated=(~ended).tolist(),
    )


class TransformersSampler:
    """`model.generate` behind the same protocol; log-probabilities from the logits that it returns."""

    name = "transformers"

    def __init__(self, model: nn.Module, *, eos_id: int, pad_id: int) -> None:
        self.model: Any = model
        self.eos_id = eos_id
        self.pad_id = pad_id

    @property
    def rng_state(self) -> Tensor:
        """State of the device's global generator, from which `generate` draws."""
        on_gpu = self.model.device.type == "cuda"
        return torch.cuda.get_rng_state(self.model.device) if on_gpu else torch.get_rng_state()

    @rng_state.setter
    def rng_state(self, state: Tensor) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.model.device)
        else:
            torch.set_rng_state(state)

    def refresh(self) -> None:
        """Nothing to do: it samples from the policy's own weights."""

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
        pause_ids: Sequence[int] = (),
    ) -> Rollout:
        """See `Sampler.sample`; draws from torch's global generator, as `generate` does."""
        ids, padding = pad_left(prompts, self.pad_id)
        attention = torch.arange(ids.shape[1]) >= padding[:, None]
        device = self.model.device
        draw = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        out = self.model.generate(
            input_ids=ids.repeat_interleave(num_samples, 0).to(device),
            attention_mask=attention.long().repeat_interleave(num_samples, 0).to(device),
            max_new_tokens=max_new_tokens,
            eos_token_id=[self.eos_id, *pause_ids],
            pad_token_id=self.pad_id,
            return_dict_in_generate=True,
            output_logits=True,
            **(draw if temperature > 0 else {"do_sample": False}),
        )
        token_ids = out.sequences[:, ids.shape[1] :]
        is_end = torch.isin(token_ids, token_ids.new_tensor([self.eos_id, *pause_ids]))
        ended = is_end.any(-1)
        width = token_ids.shape[1]
        lengths = torch.where(ended, is_end.int().argmax(-1) + 1, width)
        logprob = torch.stack(
            [
                torch.log_softmax(step.float() / (temperature or 1.0), -1).gather(
                    -1, token_ids[:, t, None]
                )[:, 0]
                for t, step in enumerate(out.logits)
            ],
            dim=1,
        )
        return unpad(prompts, num_samples, token_ids, logprob, lengths, ended)


def make_sampler(model: nn.Module, *, kind: str, eos_id: int, pad_id: int, seed: int) -> Sampler:
    """The sampler of a kind: "kv", "transformers", or "auto" (kv wherever it computes exactly the model)."""
    if kind == "kv" or (kind == "auto" and can_decode(model)):
        return KVSampler(model, eos_id=eos_id, pad_id=pad_id, seed=seed)
    torch.manual_seed(seed)
    return TransformersSampler(model, eos_id=eos_id, pad_id=pad_id)

"""The run behind `fastgrpo sft`: packed examples, constant learning rate, loss on completions only."""

import random
import time
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from fastgrpo.functional.devices import pick_device
from fastgrpo.trainer.algorithm import learning_rate_factor
from fastgrpo.trainer.commands.sft import SFTOptions
from fastgrpo.trainer.data.batch import TokenBatch
from fastgrpo.trainer.data.packing import concatenate, pack
from fastgrpo.trainer.data.records import COMPLETION, PROMPT, need_column, read_table, text_of
from fastgrpo.trainer.data.text import encode_completions, prompt_ids
from fastgrpo.trainer.options.settings import fail, to_yaml
from fastgrpo.trainer.output import rundir
from fastgrpo.trainer.output.display import make_display
from fastgrpo.trainer.output.recorder import Recorder
from fastgrpo.trainer.parallel.interrupt import Interrupt, Interrupted
from fastgrpo.trainer.policy import Policy
from fastgrpo.trainer.setup import keep_freed_memory, load_pretrained
from fastgrpo.trainer.tasks import gsm8k
from fastgrpo.trainer.tasks.base import Problem
from fastgrpo.trainer.tasks.custom import conversation

Ids = list[list[int]]


def run_sft(options: SFTOptions, started: float) -> int:
    """Trains, writes model, metrics and summary; returns the exit code."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    disable_progress_bar()
    keep_freed_memory()
    try:
        device = pick_device(options.device)
        train, test = examples(options)
        tokenizer, model = load_pretrained(options.model_name_or_path)
        run = _Run(options, Policy(model.to(device)), tokenizer, device)
        batches = run.batches(train)
        # Only now, so that a slip leaves nothing behind.
        out = rundir.claim(options.folder, "sft", to_yaml(options), options.overwrite)
    except ValueError as error:
        return fail(error)
    display, code, losses = make_display(), 0, dict[str, float]()
    with Recorder(out / rundir.METRICS) as recorder, Interrupt() as interrupt:
        try:
            losses["before"] = run.test_loss(test)
            display.note(f"everything goes to {out}/")
            display.note(
                f"{len(train)} examples, {len(test)} for the test; loss before: {losses['before']:.4f}"
            )
            display.phase("sft", len(batches))
            for step, numbers in enumerate(run.train(batches), start=1):
                recorder.write("sft", step, numbers)
                display.advance(step, f"loss {numbers['loss']:.3f}")
                interrupt.check()
            losses["after"] = run.test_loss(test)
            display.note(f"loss after: {losses['after']:.4f}")
        except Interrupted:
            code = interrupt.exit_code
        finally:
            display.close()
    model.save_pretrained(out / rundir.MODEL)
    tokenizer.save_pretrained(out / rundir.MODEL)
    summary = {"test_loss": losses, "left_out": run.left_out, "wall_s": time.time() - started}
    rundir.write_json(
        out / rundir.SUMMARY, {**summary, "config": asdict(options), "stopped": code != 0}
    )
    print(f"model in {out / rundir.MODEL}", flush=True)
    return code


def examples(options: SFTOptions) -> tuple[list[Problem], list[Problem]]:
    """Training and test examples."""
    read = gsm8k.read_problems if options.format == "gsm8k" else read_examples
    train = read(options.data)
    if options.test_data is not None:
        return train, read(options.test_data)
    held_out = [zlib.crc32(p.key.encode()) % 20 == 0 for p in train]
    return (
        [p for p, out in zip(train, held_out, strict=True) if not out],
        [p for p, out in zip(train, held_out, strict=True) if out],
    )


def read_examples(path: str) -> list[Problem]:
    """Prompts (or conversations) with their completions."""
    records = read_table(path)
    prompt = need_column(path, records, PROMPT, "prompt")
    completion = need_column(path, records, COMPLETION, "completion")
    problems = []
    for number, record in enumerate(records, start=1):
        messages = conversation(path, number, record[prompt])
        text = messages[-1]["content"] if messages else text_of(path, number, record, prompt)
        answer = text_of(path, number, record, completion)
        problems.append(Problem(text, "", answer, text, messages=messages))
    return problems


class _Run:
    """A model and the batches made for it."""

    def __init__(
        self,
        options: SFTOptions,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> None:
        self.options = options
        self.policy = policy
        self.tokenizer = tokenizer
        self.device = device
        self.left_out = 0  # examples longer than max_length

    def encode(self, problems: list[Problem]) -> tuple[Ids, Ids]:
        """Prompts and completions of the examples that are not too long."""
        prompts = prompt_ids(self.tokenizer, problems)
        completions = encode_completions(self.tokenizer, [p.solution for p in problems])
        pairs = list(zip(prompts, completions, strict=True))
        kept = [(p, c) for p, c in pairs if len(p) + len(c) <= self.options.max_length and p]
        self.left_out += len(pairs) - len(kept)
        return [p for p, _ in kept], [c for _, c in kept]

    def batches(self, problems: list[Problem]) -> list[TokenBatch]:
        """All batches of all epochs, the examples in a new order in each."""
        rng, batches = random.Random(self.options.seed), list[TokenBatch]()
        prompts, completions = self.encode(problems)
        if not prompts:
            raise ValueError(
                f"--data must hold an example of at most --max-length tokens ({self.options.max_length})"
            )
        left = self.options.num_train_epochs
        while left > 1e-9:
            order = rng.sample(range(len(prompts)), len(prompts))
            order = order[: max(1, round(min(left, 1.0) * len(order)))]
            lengths = [len(prompts[i]) + len(completions[i]) for i in order]
            rows = [[n] for n in range(len(order))]
            if self.options.packing:
                rows = concatenate(lengths, self.options.max_length)
            chosen = [[order[n] for n in row] for row in rows]
            size = self.options.per_device_train_batch_size
            for start in range(0, len(chosen), size):
                batches.append(
                    pack(chosen[start : start + size], prompts, completions, self.pad_id)
                )
            left -= 1.0
        return batches

    @property
    def pad_id(self) -> int:
        """What fills the end of rows."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(eos if pad is None else pad)

    def loss(self, batch: TokenBatch) -> torch.Tensor:
        """Mean over completion tokens."""
        mixed = (
            torch.autocast(self.device.type, torch.bfloat16) if self.options.bf16 else nullcontext()
        )
        with mixed:
            logprob: torch.Tensor = self.policy(batch.to(self.device))
        return -logprob.mean()

    def train(self, batches: list[TokenBatch]) -> Iterator[dict[str, float]]:
        """One optimizer step per batch."""
        o, model = self.options, self.policy.train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=o.learning_rate, weight_decay=o.weight_decay
        )
        for step, batch in enumerate(batches):
            factor = learning_rate_factor("constant", step, len(batches), o.warmup_steps)
            optimizer.param_groups[0]["lr"] = o.learning_rate * factor
            begun = time.perf_counter()
            loss = self.loss(batch)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), o.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - begun
            yield {
                "loss": loss.item(),
                "grad_norm": float(norm),
                "learning_rate": o.learning_rate * factor,
                "num_tokens": batch.input_ids.numel(),
                "step_time": seconds,
            }
        model.eval()

    @torch.no_grad()
    def test_loss(self, problems: list[Problem]) -> float:
        """Loss per completion token of the test examples."""
        prompts, completions = self.encode(problems)
        lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
        rows = concatenate(lengths, self.options.max_length)
        total, count = 0.0, 0
        size = self.options.per_device_train_batch_size
        for start in range(0, len(rows), size):
            batch = pack(rows[start : start + size], prompts, completions, self.pad_id)
            total += float(self.loss(batch)) * len(batch.token_ids)
            count += len(batch.token_ids)
        return total / count if count else float("nan")

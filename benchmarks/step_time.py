"""A step of the bundled trainer beside the same trainer with an eager loss, and beside TRL's GRPOTrainer.

    python -m benchmarks.step_time [--steps N] [--beta B] [--out FILE.jsonl]

One small Llama with a vocabulary of 32,000, prompts and completions of the same lengths, the same reward, AdamW in
float32, one thread. The trainers take turns step by step in one process, each with a copy of the same weights; times
are CPU time of the process. TRL trains in a thread of its own that waits for its turn.
"""

import argparse
import json
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import TrainerCallback

from fastgrpo import policy_loss
from fastgrpo.bench.run import environment
from fastgrpo.losses import PolicyLoss
from fastgrpo.objective import Objective
from fastgrpo.trainer.data.batch import TokenBatch
from fastgrpo.trainer.options.config import TrainConfig
from fastgrpo.trainer.policy import Policy, hidden_rows
from fastgrpo.trainer.setup import Run, keep_freed_memory
from fastgrpo.trainer.state import State
from fastgrpo.trainer.tasks.base import OutcomeOnly, Problem, Reward
from fastgrpo.trainer.tasks.tokenizer import word_tokenizer
from fastgrpo.trainer.train import grpo

VOCABULARY = 32_000
WARM_UP = 2
Parts = dict[str, float]  # CPU seconds of a step by part


@dataclass(frozen=True)
class Case:
    """What is trained, and on what."""

    hidden: int = 128
    layers: int = 2
    prompts: int = 4
    group: int = 8
    prompt_tokens: int = 32
    new_tokens: int = 64
    beta: float = 0.0


def score(completion_ids: Sequence[Sequence[int]], **_: object) -> list[float]:
    """The share of even tokens: nearly all groups have spread, and it costs nothing."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]


class Words(OutcomeOnly):
    """Prompts of random words."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return word_tokenizer([f" w{i}" for i in range(VOCABULARY - 3)], r" w\d+")

    def sample(self, split: str, rng: random.Random, n: int) -> list[Problem]:
        def words() -> str:
            return "".join(
                f" w{rng.randrange(VOCABULARY - 3)}" for _ in range(self.case.prompt_tokens)
            )

        return [Problem(words(), "-", "-", str(i)) for i in range(n)]

    def rewards(self, eos_id: int) -> dict[str, Reward]:
        return {"even": score}


def make_model(case: Case, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.hidden,
        intermediate_size=3 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@dataclass
class Stopwatch:
    """Adds up CPU seconds by name."""

    seconds: Parts = field(default_factory=dict)

    def time(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            begun = time.process_time()
            try:
                return call(*arguments, **options)
            finally:
                self.add(name, time.process_time() - begun)

        return timed

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def take(self) -> Parts:
        """All of it; begins anew."""
        taken, self.seconds = self.seconds, {}
        return taken


def time_head(model: LlamaForCausalLM, watch: Stopwatch) -> None:
    """Books the time from the last hidden states to their gradient as "head + loss": forward and backward of both."""

    def mark(_: Any, __: Any, output: Any) -> None:
        if output[0].requires_grad:
            begun = time.process_time()
            output[0].register_hook(lambda _: watch.add("head + loss", time.process_time() - begun))

    model.get_decoder().register_forward_hook(mark)


class EagerPolicy(Policy):
    """The trainer's policy with logits, log-softmax and entropy in plain PyTorch, differentiated by autograd."""

    def forward(
        self,
        batch: TokenBatch,
        *,
        advantage: Tensor | None = None,
        objective: Objective | None = None,
        rollout_logprob: Tensor | None = None,
        **options: Any,
    ) -> PolicyLoss | Tensor:
        hidden = hidden_rows(self.model.get_decoder(), batch)
        logits = self.model.get_output_embeddings()(hidden).float() / self.temperature
        every = torch.log_softmax(logits, -1)
        logprob = every.gather(-1, batch.token_ids[:, None])[:, 0]
        if advantage is None or objective is None:
            return logprob
        with torch.no_grad():
            entropy = -(every.exp() * every).sum(-1)
        mask = torch.ones_like(batch.token_ids, dtype=torch.bool)
        result = policy_loss(
            logprob, advantage, mask, entropy=entropy, objective=objective, cu_seqlens=batch.cu_seqlens, **options
        )  # fmt: skip
        return result._replace(logprob=logprob.detach())


def bundled(case: Case, policy_class: type[Policy]) -> Iterator[Parts]:
    """Steps of the bundled trainer."""
    task, watch = Words(case), Stopwatch()
    tokenizer = task.tokenizer()
    config = TrainConfig(
        job="copy",
        max_steps=10**6,
        prompts_per_step=case.prompts,
        num_generations=case.group,
        max_completion_length=case.new_tokens,
        per_device_train_batch_size=case.prompts * case.group,
        beta=case.beta,
        learning_rate=1e-6,
    )
    model = make_model(case, tokenizer)
    time_head(model, watch)
    policy = policy_class(model).eval()
    run = Run(config, task, tokenizer, policy, torch.device("cpu"))
    state = State(run)
    state.sample = watch.time("generate", state.sample)  # type: ignore[method-assign]
    steps = grpo(run, state)
    while True:
        begun = time.process_time()
        next(steps)
        yield {"step": time.process_time() - begun} | watch.take()


class Turns(TrainerCallback):
    """Lets TRL make one step whenever it is asked for one."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.stop = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.go.acquire()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.done.release()
        self.go.acquire()
        control.should_training_stop = self.stop


def trl(case: Case) -> Iterator[Parts]:
    """Steps of TRL's trainer: its own fused head, and `generate`."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    task, watch, turns = Words(case), Stopwatch(), Turns()
    tokenizer = task.tokenizer()
    problems = task.sample("train", random.Random(0), 4096)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=f"{folder}/run",
            model_init_kwargs={"dtype": "float32"},
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            loss_type="grpo",
            beta=case.beta,
            num_generations=case.group,
            max_completion_length=case.new_tokens,
            per_device_train_batch_size=case.prompts * case.group,
            gradient_accumulation_steps=1,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            max_steps=10**6,
            temperature=1.0,
            logging_steps=10**6,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        start = Path(folder) / "start"
        make_model(case, tokenizer).save_pretrained(start)  # TRL reads its reference from a path
        trainer = GRPOTrainer(
            model=str(start),
            reward_funcs=score,
            args=config,
            train_dataset=Dataset.from_dict({"prompt": [p.prompt for p in problems]}),
            processing_class=tokenizer,
            callbacks=[turns],
        )
        model: Any = trainer.model
        time_head(model, watch)
        model.generate = watch.time("generate", model.generate)
        thread = threading.Thread(target=trainer.train, daemon=True)
        thread.start()
        try:
            while True:
                begun = time.process_time()
                turns.go.release()
                while not turns.done.acquire(timeout=1.0):
                    if not thread.is_alive():
                        raise RuntimeError("TRL's trainer has ended")
                yield {"step": time.process_time() - begun} | watch.take()
        finally:
            turns.stop = True
            turns.go.release()
            thread.join()


def compare(case: Case, steps: int) -> list[dict[str, Any]]:
    """One record per trainer: medians and every repetition, in CPU seconds."""
    contenders = {
        "fastgrpo": bundled(case, Policy),
        "fastgrpo, eager loss": bundled(case, EagerPolicy),
        "TRL": trl(case),
    }
    measured: dict[str, list[Parts]] = {name: [] for name in contenders}
    for number in range(WARM_UP + steps):
        for name, turn in contenders.items():
            parts = next(turn)
            if number >= WARM_UP:
                measured[name].append(parts)
    for turn in contenders.values():
        turn.close()  # type: ignore[attr-defined]
    ours = [parts["step"] for parts in measured["fastgrpo"]]
    records = []
    for name, rows in measured.items():
        ratios = [parts["step"] / own for parts, own in zip(rows, ours, strict=True)]
        records.append(
            {
                "trainer": name,
                "case": vars(case) | {"vocabulary": VOCABULARY},
                "seconds": {part: statistics.median(r[part] for r in rows) for part in rows[0]},
                "ratio": statistics.median(ratios),
                "repetitions": rows,
            }
        )
    return records


def show(records: Sequence[dict[str, Any]]) -> None:
    """Print a table."""
    print(
        f"{'CPU ms':22}"
        + "".join(f"{part:>14}" for part in ("step", "generate", "head + loss", "ratio"))
    )
    for record in records:
        seconds = record["seconds"]
        cells = [
            f"{1e3 * seconds[part]:14.1f}" if part in seconds else f"{'':14}"
            for part in ("step", "generate", "head + loss")
        ]
        print(f"{record['trainer']:22}" + "".join(cells) + f"{record['ratio']:14.2f}")


def main() -> None:
    """Measure, print, and perhaps append to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    records = compare(replace(Case(), beta=options.beta), options.steps)
    show(records)
    if options.out is not None:
        with options.out.open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps({**environment(torch.device("cpu"), 0), **record}) + "\n")


if __name__ == "__main__":
    main()

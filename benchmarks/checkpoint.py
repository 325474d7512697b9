"""What a checkpoint costs: its files against a raw write of the same bytes, and how long training waits for a save.

    python -m benchmarks.checkpoint [--megabytes 2048] [--repeats 7] [--folder DIR] [--write]

A save writes weights, reference and both moments, hashes them, syncs them and reads them back; the raw write does one
file and one sync. Both are interleaved. Then GRPO on models of three sizes: seconds per step without saves, and how
long a step waits for a save with and without --async-save; `slowdown` is how much longer the steps take in which a save
goes on in the background (it competes for the same cores). With --write the results go to
benchmarks/results/checkpoint.json, which docs/long_runs.md quotes.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fastgrpo.trainer.checkpoint import tree
from fastgrpo.trainer.checkpoint.checkpointer import Checkpointer
from fastgrpo.trainer.checkpoint.contents import as_it_is
from fastgrpo.trainer.checkpoint.store import Checkpoint, Store
from fastgrpo.trainer.checkpoint.weights import part_files
from fastgrpo.trainer.options.jobs import default_config, make_task
from fastgrpo.trainer.options.opening import Opened
from fastgrpo.trainer.parallel.distributed import Ranks
from fastgrpo.trainer.policy import Policy
from fastgrpo.trainer.setup import Run, keep_freed_memory
from fastgrpo.trainer.state import State
from fastgrpo.trainer.train import grpo

RESULTS = Path(__file__).parent / "results" / "checkpoint.json"
SHARES = {"model": 1, "reference": 1, "optimizer": 2}
SIZES = {"0.3M": (64, 4), "9M": (320, 6), "48M": (640, 8)}  # hidden size, blocks
STEPS = 6


def raw(path: Path, pieces: list[bytes | memoryview]) -> float:
    """Seconds to write and sync one file."""
    begun = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            left = memoryview(piece)
            while left:
                left = left[file.write(left) :]
        os.fsync(file.fileno())
    return time.perf_counter() - begun


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    result = action()
    return time.perf_counter() - begun, result


def against_raw(folder: Path, parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, float]:
    """One round: the raw write, the save, and what resuming reads once more."""
    pieces = [piece for tensors in parts.values() for piece in tree.Pieces(tensors)]
    seconds = {"raw_s": raw(folder / "raw", pieces)}
    store = Store(folder / "checkpoints", limit=1)
    files = [f for part, t in parts.items() for f in part_files(part, t, Ranks(), as_it_is)]
    seconds["save_s"], path = timed(lambda: store.save((1, -1), files))
    seconds["verify_s"], _ = timed(Checkpoint(path).verify)
    return seconds


def files_against_raw(megabytes: int, repeats: int, folder: str | None) -> dict[str, float]:
    """Medians over rounds, and of the ratio of each round."""
    share = megabytes // sum(SHARES.values())
    parts = {
        part: {f"{part}.{i}": torch.randn(share << 14) for i in range(16 * n)}
        for part, n in SHARES.items()
    }
    with tempfile.TemporaryDirectory(dir=folder) as name:
        against_raw(Path(name), parts)  # the first touches the disk's free space
        rounds = []
        for number in range(
            repeats
        ):  # each in the page cache of the one before: the raw write is at its fastest
            place = Path(name) / str(number)
            place.mkdir()
            rounds.append(against_raw(place, parts))
            shutil.rmtree(place)
    row = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    row["save_over_raw"] = statistics.median(r["save_s"] / r["raw_s"] for r in rounds)
    # On a busy machine: the round in which others disturbed each least.
    row["best_over_best"] = min(r["save_s"] for r in rounds) / min(r["raw_s"] for r in rounds)
    return {"megabytes": megabytes} | {key: round(value, 3) for key, value in row.items()}


def training(size: tuple[int, int]) -> Run:
    """The default job's sampling, on a model of a size."""
    config = replace(
        default_config("story"),
        max_steps=STEPS,
        prompts_per_step=4,
        eval_questions=0,
        eval_steps=0,
        temperature=2.0,
    )
    task = make_task(config)
    tokenizer = task.tokenizer()
    hidden, blocks = size
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=blocks,
            num_attention_heads=hidden // 32,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return Run(config, task, tokenizer, Policy(model).eval(), torch.device("cpu"))


def steps_with_saves(
    size: tuple[int, int], how: str, folder: Path
) -> tuple[list[float], list[float]]:
    """(seconds of each step, seconds that training waited after it) with a save after every second step."""
    run = training(size)
    run.config = replace(run.config, async_save=how == "background")
    state = State(run)
    keeper = Checkpointer(state, Opened(folder, None), print)
    times, waits = [], []
    begun = time.perf_counter()
    for number, _ in enumerate(grpo(run, state)):
        times.append(time.perf_counter() - begun)
        before = keeper.seconds
        if how != "never" and number % 2:
            keeper.save({})
        waits.append(keeper.seconds - before)
        begun = time.perf_counter()
    keeper.finish()
    return times, waits


def stall(size: tuple[int, int]) -> dict[str, Any]:
    """The steps with and without saves; the first save of a run also gets the memory for its copy."""
    found = {}
    for how in ("never", "waiting", "background"):
        with tempfile.TemporaryDirectory() as name:
            found[how] = steps_with_saves(size, how, Path(name))
    step = statistics.median(found["never"][0][1:])
    waits = [w for w in found["background"][1] if w]
    after_save = [
        t for t, w in zip(found["background"][0][1:], found["background"][1], strict=False) if w
    ]
    waiting = statistics.median([w for w in found["waiting"][1] if w])
    copy = statistics.median(waits[1:])
    return {
        "step_s": round(step, 4),
        "waiting_s": round(waiting, 4),
        "copy_s": round(copy, 4),
        "first_copy_s": round(waits[0], 4),
        "stall": round(copy / step, 4),
        "stall_without_async": round(waiting / step, 4),
        "slowdown": round(statistics.median(after_save) / step - 1, 3),
    }


def main() -> None:
    """Prints one JSON line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--megabytes", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", default=None, help="on the disk to measure")
    parser.add_argument("--write", action="store_true", help="keep the results in the repository")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows: dict[str, Any] = {"cores": os.cpu_count()}
    rows["files"] = files_against_raw(options.megabytes, options.repeats, options.folder)
    print(json.dumps(rows["files"]))
    rows["training"] = {}
    for name, size in SIZES.items():
        rows["training"][name] = stall(size)
        print(name, json.dumps(rows["training"][name]), flush=True)
    if options.write:
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

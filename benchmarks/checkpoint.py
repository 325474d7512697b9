"""Time to save and to verify a checkpoint against writing and syncing the same bytes as they are.

    python -m benchmarks.checkpoint [--megabytes 256] [--repeats 5] [--folder DIR]

Both are interleaved; the medians and the ratio of each pair are printed as one JSON line.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save

from fastgrpo.trainer.checkpoint import tree
from fastgrpo.trainer.checkpoint.store import Checkpoint, Store


def raw(path: Path, content: bytes) -> float:
    """Seconds to write and sync one file."""
    begun = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    return time.perf_counter() - begun


def measure(folder: Path, weights: dict[str, torch.Tensor], content: bytes) -> dict[str, float]:
    """One round: the raw write, the save (serialising included), the verification."""
    seconds = {"raw_s": raw(folder / "raw", content)}
    store = Store(folder / "checkpoints", limit=0)
    begun = time.perf_counter()
    path = store.save((1, -1), [("model.safetensors", tree.pieces(tree.flatten(weights)[0]))])
    seconds["save_s"] = time.perf_counter() - begun
    begun = time.perf_counter()
    Checkpoint(path).verify()
    seconds["verify_s"] = time.perf_counter() - begun
    shutil.rmtree(folder / "checkpoints")
    return seconds


def main() -> None:
    """Prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=None, help="on the disk to measure")
    options = parser.parse_args()
    count = max(1, options.megabytes // 16)
    weights = {f"w{i}": torch.randn(4 << 20) for i in range(count)}
    content = save(weights)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        measure(Path(name), weights, content)  # the first touches the disk's free space
        rounds = [measure(Path(name), weights, content) for _ in range(options.repeats)]
    row = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    row["save_over_raw"] = statistics.median(r["save_s"] / r["raw_s"] for r in rounds)
    both = [(r["save_s"] + r["verify_s"]) / r["raw_s"] for r in rounds]
    row["save_and_verify_over_raw"] = statistics.median(both)
    row["verify_gb_per_s"] = count * 16 * (1 << 20) / 1e9 / row["verify_s"]
    print(json.dumps({"megabytes": count * 16} | {k: round(v, 3) for k, v in row.items()}))


if __name__ == "__main__":
    main()

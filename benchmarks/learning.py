"""Does every algorithm learn? The story job by each of them, three seeds, against the default (GRPO by outcome).

    python -m benchmarks.learning [--seeds 0 1 2] [--only outcome ppo ...] [--folder runs/learning] [--again]

Appends a line per run to benchmarks/results/learning.jsonl, leaving out what is there already, then prints the table
of docs/learning.md. Exit code 1 if an algorithm's mean pass@1 after training is more than .05 below the default's.
The base model of a seed is made once and shared by all of its runs; the runs come one after the other, on one thread.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any, get_args

from benchmarks.readme_tables import NOTHING, table
from fastgrpo.trainer.options.config import ObjectiveName

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "learning.jsonl"
DEFAULT = "outcome"
ALLOWED = 0.05
"""How far below the default's an algorithm's pass@1 may be."""
OBJECTIVES = [name for name in get_args(ObjectiveName) if name != "grpo"]
TWICE = "--num-iterations=2"
"""Of one update per batch the ratio is 1 and nothing is clipped: it takes a second to tell some objectives apart."""
VARIANTS: dict[str, tuple[str, ...]] = {
    DEFAULT: (),
    "process": ("--supervision=process",),
    "iterative": ("--ref-sync-steps=10", TWICE),
    **{name: (f"--objective={name}",) for name in OBJECTIVES},
    f"{DEFAULT}-twice": (TWICE,),
    **{f"{name}-twice": (f"--objective={name}", TWICE) for name in OBJECTIVES},
}
KEPT = ("base", "final", "stderr", "mean_length", "cpu_s")
"""What of a run's summary.json is kept."""


def train(variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """Runs the job as a user does; returns what is kept of it."""
    out = folder / f"{variant}-{seed}"
    quiet = ("--overwrite", "--eval-steps=0", "--save-steps=0", "--no-report")
    command = [sys.executable, "-m", "fastgrpo", "train", "story", f"--seed={seed}"]
    subprocess.run(
        [*command, f"--output-dir={out}", *quiet, *VARIANTS[variant]],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    summary = json.loads((out / "summary.json").read_text())
    commit = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(commit, cwd=ROOT, capture_output=True, text=True, check=False)
    about = {"variant": variant, "options": list(VARIANTS[variant]), "seed": seed}
    return about | {name: summary[name] for name in KEPT} | {"commit": done.stdout.strip()}


def read(path: Path | None = None) -> list[dict[str, Any]]:
    """The committed runs."""
    path = path or RESULTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def shortfalls(runs: list[dict[str, Any]]) -> dict[str, float]:
    """By how much more than is allowed an algorithm's mean pass@1 lies below the default's on the same seeds."""
    found = {}
    for variant in VARIANTS:
        gaps = gap(runs, variant)
        if gaps and mean(gaps) < -ALLOWED:
            found[variant] = -ALLOWED - mean(gaps)
    return found


def final(runs: list[dict[str, Any]], variant: str) -> dict[int, float]:
    """pass@1 after training, by seed."""
    return {run["seed"]: run["final"]["pass@1"] for run in runs if run["variant"] == variant}


def gap(runs: list[dict[str, Any]], variant: str) -> list[float]:
    """What is gained over the default, for every seed that both were run with."""
    default = final(runs, DEFAULT)
    mine = final(runs, variant)
    return [mine[seed] - default[seed] for seed in sorted(mine) if seed in default]


def report() -> str:
    """The table, and what falls short of the goal."""
    measured = read()
    if not final(measured, DEFAULT):
        return NOTHING
    short, rows = shortfalls(measured), []
    for variant in VARIANTS:
        mine = [run for run in measured if run["variant"] == variant]
        against = gap(measured, variant)
        cells = ["*not measured*"]
        if against:
            after = [100 * run["final"]["pass@1"] for run in mine]
            spread = f"{min(after):.1f}-{max(after):.1f}"
            alone = f"seed {mine[0]['seed']} only"
            cells = [
                f"{mean(after):.1f} ({spread if len(mine) > 1 else alone})",
                points(mean(against)),
                points(min(against)),
                f"{mean(run['mean_length']['final'] for run in mine):.1f}",
                f"{mean(run['cpu_s'] for run in mine):.0f}",
                f"**no: {100 * short[variant]:.1f} too low**" if variant in short else "yes",
            ]
        rows.append([named(variant), *cells, *[""] * (6 - len(cells))])
    head = ["options", "pass@1 after, %", "against the default", "worst seed", "tokens", "CPU s"]
    seeds = ", ".join(str(seed) for seed in sorted({run["seed"] for run in measured}))
    before = mean(100 * run["base"]["pass@1"] for run in measured if run["variant"] == DEFAULT)
    verdict = "None that was measured falls short."
    if short:
        verdict = f"**Short of the goal: {', '.join(named(variant) for variant in short)}.**"
    return table([*head, f"within {100 * ALLOWED:g} points"], rows) + (
        f"\nMeans over seeds {seeds} (lowest-highest); pass@1 before training {before:.1f} %. {verdict}\n"
    )


def points(difference: float) -> str:
    """A difference in percentage points, with its sign."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}"  # -0.0 is none


def named(variant: str) -> str:
    """What a user types for it."""
    return f"`{' '.join(VARIANTS[variant])}`" if VARIANTS[variant] else "default"


def main(argv: list[str] | None = None) -> int:
    """Runs what is missing and says how it went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="ALGORITHM"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "learning")
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
    args = parser.parse_args(argv)
    wanted = [(variant, seed) for seed in args.seeds for variant in args.only]
    kept = [run for run in read() if not (args.again and (run["variant"], run["seed"]) in wanted)]
    done = {(run["variant"], run["seed"]) for run in kept}
    for variant, seed in wanted:
        if (variant, seed) not in done:
            kept.append(train(variant, seed, args.folder.absolute()))
            kept.sort(key=lambda run: (list(VARIANTS).index(run["variant"]), run["seed"]))
            RESULTS.write_text("".join(json.dumps(run) + "\n" for run in kept))
            print(f"{variant} {seed}: pass@1 {final(kept, variant)[seed]:.3f}", flush=True)
    print(report())
    return 1 if shortfalls(kept) else 0


if __name__ == "__main__":
    sys.exit(main())

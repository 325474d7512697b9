"""Copies what finished training runs have measured into benchmarks/results/jobs.jsonl, a line per run.

    for s in 0 1 2; do fastgrpo train story --seed $s --output-dir runs/story-$s --no-cache-base; done
    python -m benchmarks.collect_jobs runs/story-*
    python -m benchmarks.readme_tables

All lines of the jobs that are given are replaced: a table never mixes runs of different recipes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.readme_tables import RESULTS

PATHS = ("output_dir", "data", "test_data", "model_name_or_path")


def summary(folder: Path) -> dict[str, Any]:
    """A run's summary without the folders of the machine that it was made on."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    config = found["config"]
    config |= {name: Path(config[name]).name for name in PATHS if config[name] is not None}
    return found


def main(argv: list[str] | None = None) -> None:
    """Replace the lines of the jobs of these runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of finished runs")
    new = [summary(folder) for folder in parser.parse_args(argv).runs]
    target = RESULTS / "jobs.jsonl"
    old = [json.loads(line) for line in target.read_text().splitlines()] if target.exists() else []
    jobs = {run["config"]["job"] for run in new}
    runs = [run for run in old if run["config"]["job"] not in jobs] + new
    runs.sort(key=lambda run: (run["config"]["job"], run["config"]["seed"]))
    target.write_text("".join(json.dumps(run) + "\n" for run in runs))
    print(f"{target.name}: {len(runs)} runs, {len(new)} of them new")


if __name__ == "__main__":
    main()

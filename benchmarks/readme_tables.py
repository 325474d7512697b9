"""Fills the blocks `<!-- results:NAME -->` ... `<!-- /results:NAME -->` from benchmarks/results: no typed figures.

    python -m benchmarks.readme_tables           rewrite README.md and the pages of docs/ that have blocks
    python -m benchmarks.readme_tables --check   exit code 1 if a block is stale

NAME: cpu, cpu-2-threads, cpu-goals, cpu-all (results/cpu-*.jsonl), gpu (results/gpu-*.jsonl), job-story and
other jobs (results/jobs.jsonl: the summary.json of one run per line), learning (results/learning.jsonl), scaling
(results/scaling.json), callgrind, step-time (results/step_time.jsonl).
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import mean

from benchmarks import long_runs
from benchmarks.long_runs import NOTHING
from benchmarks.measured import Run, middle, ratio, runs
from fastgrpo.bench.goals import Verdict, verdicts
from fastgrpo.bench.report import HEADER, cells
from fastgrpo.bench.rows import Row

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("benchmarks", "trainer", "learning", "long_runs")),
)
BLOCK = re.compile(r"(<!-- results:([\w-]+) -->\n)(.*?)(<!-- /results:\2 -->)", re.DOTALL)
PEERS = ("torch.compile", "eager", "TRL", "Liger", "F.linear_cross_entropy")
WORDS = {
    "logprob": "log-prob",
    "loss": "logits → loss",
    "linear": "hidden → loss",
    "forward": "forward",
    "train": "loss and gradient",
}


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def about(run: Run) -> str:
    """Where and when a table was measured."""
    e = run.environment
    versions = ", ".join(f"{name} {v}" for name, v in e["versions"].items() if v)
    on_cpu = (
        f", {run.threads} thread{'s' * (run.threads > 1)}, {e['cpu_isa']}" if e["cpu_isa"] else ""
    )
    return (
        f"{e['device']}{on_cpu}, {versions}, {e['date'][:10]}, commit {' and '.join(run.commits)}"
    )


def title(row: Row) -> str:
    """A case in words, without its size."""
    if row.what == "advantage":
        return row.case
    what = (
        f"{WORDS[row.what]}, {WORDS[row.mode]}"
        if row.what != "logprob"
        else f"{WORDS[row.what]} {row.mode}"
    )
    marks = [row.dtype.replace("bfloat16", "bf16").replace("float32", "fp32")]
    if row.entropy:
        marks.append("entropy")
    if row.frozen_head:
        marks.append("frozen head")
    if row.active < 1:
        marks.append(f"{row.active:.0%} active by {row.skip_by}")
    return f"{what}, {', '.join(marks)}"


def speed(of: list[Run], on_gpu: bool = False) -> str:
    """Peers against ours, a row per case: how many times longer they take. Only what all runs agree on."""
    if not of:
        return NOTHING
    left_out, lines = [], []
    for case, group in groupby(middle(of), key=lambda row: row.case):
        rows = {row.provider: row for row in group}
        ours = min(
            (r for r in rows.values() if r.ours and r.speedup_of_ours),
            key=lambda r: r.ms,
            default=None,
        )
        if ours is None:
            continue
        line = [
            title(ours),
            f"{ours.ms:.3g} ms{' in place' if 'in place' in ours.provider else ''}",
        ]
        for peer in PEERS:
            found = ratio(peer, case, of)
            if found is None:
                line.append("wrong" if peer in rows and rows[peer].wrong else "")
            elif not found.agrees:
                line.append("†")
                left_out.append(f"{title(ours)}: {peer}")
            else:
                line.append(f"{found.mean:.1f}x" if found.mean >= 1 else f"**{found.mean:.2f}x**")
        line.append("" if ours.to_floor is None else f"{ours.to_floor:.2f}x")
        lines.append(line)
    sizes = sorted({f"N={r.tokens}, V={r.vocabulary:,}" for r in middle(of) if r.vocabulary > 1})
    text = table(["", "fastgrpo", *PEERS, "limit"], lines)
    text += f"\n{about(of[0])}; {' and '.join(sizes)}. "
    text += (
        "Peers: their time divided by ours, each in its better allocator setting; below 1 (bold) the peer is faster. "
        "Limit: our time divided by that of the bare matrix products, or of moving the logits. Means of all runs."
    )
    if left_out:
        text += f" †: left out, the runs differ by more than 10 % ({len(left_out)} of {len(lines) * len(PEERS)})."
    judged = of if on_gpu or of[0].threads == 1 else []  # CPU goals are for one thread
    failed = [v for run in judged for v in verdicts(run.rows, on_gpu) if not v.passed]
    missed = sorted({f"{v.case}: {v.goal} {v.target:g}" for v in failed})
    if missed:
        text += f" Goals missed in at least one run: {'; '.join(missed)} (docs/benchmarks.md has every run)."
    return text + "\n"


def _cpu(threads: int) -> list[Run]:
    return [run for run in runs(sorted(RESULTS.glob("cpu-*.jsonl"))) if run.threads == threads]


def _gpu() -> list[Run]:
    return runs(sorted(RESULTS.glob("gpu-*.jsonl")))


def goals() -> str:
    """Every goal and its outcome in every run with one thread."""
    of = _cpu(1)
    if not of:
        return NOTHING
    found: dict[tuple[str, str], list[Verdict]] = {}
    for run in of:
        for verdict in verdicts(run.rows, False):
            found.setdefault((verdict.case, verdict.goal), []).append(verdict)
    rows = []
    for (case, goal), several in found.items():
        sign = ">=" if several[0].at_least else "<="
        values = ", ".join(f"{verdict.value:.2f}" for verdict in several)
        outcome = "pass" if all(verdict.passed for verdict in several) else "**FAIL**"
        rows.append([case, goal, f"{sign} {several[0].target:g}", values, outcome])
    return table(["case", "goal", "target", "measured, each run", ""], rows) + f"\n{about(of[0])}\n"


def everything() -> str:
    """All rows with one thread, case by case, of the median run."""
    of = _cpu(1)
    if not of:
        return NOTHING
    parts = []
    for case, group in groupby(middle(of), key=lambda row: row.case):
        parts.append(f"**{case}**\n\n" + table(list(HEADER), [list(cells(row)) for row in group]))
    return "\n".join(parts)


def job(name: str) -> str:
    """Scores of a training job before and after, over the seeds."""
    path = RESULTS / "jobs.jsonl"
    runs_of = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    seeds = [run for run in runs_of if run["config"]["job"] == name]
    if not seeds:
        return NOTHING
    config = seeds[0]["config"]
    first = {
        "base": "after SFT" if config["sft_steps"] else "random weights",
        "final": "after GRPO",
    }
    rows = []
    for model, label in first.items():
        scores = [[100 * seed[model][score] for seed in seeds] for score in seeds[0][model]]
        values = [f"{mean(v):.1f} ({min(v):.1f}-{max(v):.1f})" for v in scores]
        length = mean(seed["mean_length"][model] for seed in seeds)
        rows.append([label, *values, f"{length:.1f}"])
    text = table(["%", *seeds[0]["base"], "tokens"], rows)
    return text + (
        f"\nMean (lowest-highest) of seeds {', '.join(str(seed['config']['seed']) for seed in seeds)}; "
        f"{seeds[0]['eval_questions']['final']} held-out questions; {config['max_steps']} GRPO steps of "
        f"{config['prompts_per_step']} x {config['num_generations']} completions; the whole run takes "
        f"{mean(seed['wall_s'] for seed in seeds):.0f} s ({mean(seed['cpu_s'] for seed in seeds):.0f} s of one core).\n"
    )


def learning() -> str:
    """Every algorithm on the default job."""
    from benchmarks.learning import report

    return report()


def scaling() -> str:
    """The fitted cost model of every op."""
    path = RESULTS / "scaling.json"
    if not path.exists():
        return NOTHING
    study = json.loads(path.read_text())
    rows = [[f["op"], f["formula"], f"{f['r2']:.3f}", f"{f['worst']:.0%}"] for f in study["fits"]]
    head = ["op", "CPU ms, fitted", "R²", "worst error of a point"]
    return table(head, rows) + f"\n{study['about']}\n"


def callgrind() -> str:
    """Instructions per element or token of the AVX2 kernels."""
    from benchmarks.callgrind_gate import BASELINE, COLUMNS, TOKENS

    lines = []
    for compiler, counts in json.loads(BASELINE.read_text()).items():
        for name, count in counts.items():
            size, unit = (TOKENS, "token") if name.startswith("policy") else (COLUMNS, "element")
            lines.append([name, f"{count / size:.2f} per {unit}", compiler])
    return table(["kernel (AVX2)", "instructions", "compiler"], lines)


def step_time() -> str:
    """A step of the bundled trainer beside the same with an eager loss, and TRL's."""
    path = RESULTS / "step_time.jsonl"
    if not path.exists():
        return NOTHING
    records = [json.loads(line) for line in path.read_text().splitlines()]
    rows = []
    for record in records:
        seconds, step = record["seconds"], record["seconds"]["step"]
        cells = [f"{1e3 * seconds[part]:.0f}" for part in ("generate", "head + loss", "step")]
        share = f"{seconds['head + loss'] / step:.0%}"
        versus = "1" if record["trainer"] == "fastgrpo" else f"{record['ratio']:.2f}x"
        rows.append([f"{record['case']['beta']:g}", record["trainer"], *cells, share, versus])
    case, e = records[0]["case"], records[0]
    head = [
        "beta",
        "trainer",
        "generate, ms",
        "head + loss, ms",
        "step, ms",
        "head + loss",
        "step, times ours",
    ]
    versions = ", ".join(f"{name} {v}" for name, v in e["versions"].items() if v)
    size = f"V = {case['vocabulary']:,}, H = {case['hidden']}, {case['layers']} layers, float32"
    where = (
        f"{e['device']}, {e['cpu_isa']}, 1 thread, {versions}, {e['date'][:10]}, commit {e['git']}"
    )
    return table(head, rows) + (
        f"\n{case['prompts']} x {case['group']} completions of {case['new_tokens']} tokens, {size}; medians of "
        f"processor time of {len(e['repetitions'])} steps, ratios taken step by step. {where}\n"
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "cpu": lambda: speed(_cpu(1)),
    "cpu-2-threads": lambda: speed(_cpu(2)),
    "cpu-goals": goals,
    "cpu-all": everything,
    "gpu": lambda: speed(_gpu(), on_gpu=True),
    **{f"job-{name}": partial(job, name) for name in ("story", "copy", "gsm8k-equations")},
    "learning": learning,
    "scaling": scaling,
    "callgrind": callgrind,
    "step-time": step_time,
    **long_runs.BLOCKS,
}


def filled(text: str) -> str:
    """The page with every block filled."""

    def block(match: re.Match[str]) -> str:
        name = match[2]
        if name not in BLOCKS:
            raise SystemExit(f"no results called {name!r}; known: {', '.join(BLOCKS)}")
        return match[1] + BLOCKS[name]() + match[4]

    return BLOCK.sub(block, text)


def main(argv: list[str] | None = None) -> int:
    """Rewrite the pages, or say which are stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 if a page is stale"
    )
    args = parser.parse_args(argv)
    stale = []
    for page in PAGES:
        before = page.read_text()
        after = filled(before)
        if before != after:
            stale.append(page.relative_to(ROOT))
            if not args.check:
                page.write_text(after)
    for page in stale:
        print(
            f"{page} {'is stale: run python -m benchmarks.readme_tables' if args.check else 'rewritten'}"
        )
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())

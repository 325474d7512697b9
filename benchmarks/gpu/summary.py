"""One page and one file from a folder of the GPU check. Needs no GPU and no torch.

python -m benchmarks.gpu.summary OUT STAGE=SECONDS=CODE ...
"""

import json
import sys
from pathlib import Path

MEANING = {"0": "passed", "124": "TIMED OUT", "77": "skipped"}


def stages(arguments: list[str]) -> list[str]:
    """A table row per stage."""
    lines = ["| stage | seconds | outcome |", "|---|---|---|"]
    for argument in arguments:
        name, seconds, code = argument.split("=")
        lines.append(f"| {name} | {seconds} | {MEANING.get(code, f'FAILED ({code})')} |")
    return lines


def answers(path: Path) -> list[str]:
    """Prediction beside measurement."""
    lines = [
        "",
        "## Open questions",
        "",
        "| | what | predicted | measured | why |",
        "|---|---|---|---|---|",
    ]
    for record in _records(path):
        measured = record.get("measured", record.get("error", ""))
        text = f"{measured:.3g}" if isinstance(measured, float) else str(measured)
        cells = (
            record["question"],
            record.get("what", ""),
            record.get("predicted", ""),
            text,
            record.get("why", ""),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def ceilings(path: Path) -> list[str]:
    """What the machine can do."""
    lines = ["", "## Ceilings", ""]
    for record in _records(path):
        parts = [f"{value:.4g} {name}" for name, value in record.items() if name != "name"]
        lines.append(f"* {record['name']}: {', '.join(parts)}")
    return lines


def tuned(path: Path) -> list[str]:
    """Where the checked-in launch table is not the best."""
    best = [record for record in _records(path) if "best" in record]
    lines = ["", "## Launch table", ""]
    return lines + [
        f"* {r['what']} V={r['vocabulary']} {r['dtype']}: {r['best']}, {r['gain']:.2f}x of the table's"
        for r in best
    ]


def _records(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> int:
    """Write OUT/summary.md and OUT/results.jsonl (all benchmark rows)."""
    out = Path(sys.argv[1])
    rows = [path.read_text() for path in sorted(out.glob("bench-*/results.jsonl"))]
    (out / "results.jsonl").write_text("".join(rows))
    pages = [path.read_text() for path in sorted(out.glob("bench-*/results.md"))]
    lines = ["# GPU check", "", *stages(sys.argv[2:])]
    lines += (
        ceilings(out / "ceilings.jsonl")
        + answers(out / "questions.jsonl")
        + tuned(out / "tune.jsonl")
    )
    (out / "summary.md").write_text("\n".join(lines) + "\n\n" + "\n".join(pages))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())

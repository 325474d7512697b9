"""Results as a table, JSON lines, a Markdown page and a plot."""

from itertools import groupby
from pathlib import Path
from typing import Any

from fastgrpo.bench.goals import Verdict
from fastgrpo.bench.rows import Row

HEADER = (
    "provider",
    "ms",
    "IQR",
    "vs floor",
    "ours is",
    "kernel x skipped",
    "extra MiB",
    "errors (vs float64)",
    "remarks",
)


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    if row.unavailable:
        return (row.provider, "-", *[""] * (len(HEADER) - 3), f"not measured: {row.unavailable}")
    speed = ""
    if row.wrong:
        speed = "WRONG"
    elif row.speedup_of_ours is not None and not row.ours:
        ratio = row.speedup_of_ours
        speed = f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x SLOWER"
    marks = [row.note] if row.note else []
    if row.entropy and not (row.has_entropy or row.floor) and row.what != "advantage":
        marks.append("computes less: no entropy")
    if row.skips and row.active < 1:
        marks.append(f"skips rows: {row.skips}")
    split = ""
    if row.kernel_speedup and row.skipped_speedup and not row.ours:
        split = f"{row.kernel_speedup:.2f} x {row.skipped_speedup:.2f}"
    remark = "; ".join(marks)
    return (
        row.provider,
        f"{row.ms:.3g}",
        f"{row.ms_low:.3g}-{row.ms_high:.3g}",
        "" if row.to_floor is None else f"{row.to_floor:.2f}x",
        speed,
        split,
        f"{row.extra_mib:.0f}",
        " ".join(f"{name} {error:.1e}" for name, error in row.errors.items()),
        remark,
    )


def print_table(rows: list[Row], goals: list[Verdict]) -> None:
    """Print one case, and the goals that it decides."""
    lines = [HEADER, *(cells(row) for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(HEADER))]
    print(f"\n{rows[0].case}")
    for line in lines:
        print(
            "  "
            + "  ".join(
                cell.ljust(width) for cell, width in zip(line, widths, strict=True)
            ).rstrip()
        )
    for goal in goals:
        print(f"  goal {goal}")


def markdown(env: dict[str, Any], rows: list[Row], goals: list[Verdict]) -> str:
    """A page with one table per case; losses stand beside wins."""
    versions = ", ".join(f"{name} {v}" for name, v in env["versions"].items() if v)
    lines = [
        f"# Benchmark on {env['device']}",
        "",
        f"{env['date']}, {env['threads']} thread(s), ISA {env['cpu_isa']}, {versions}, git {env['git']}, "
        f"transparent huge pages {'on' if env['thp'] else 'off'}. Providers interleaved; medians.",
    ]
    for case, group in groupby(rows, key=lambda row: row.case):
        lines += [
            "",
            f"## {case}",
            "",
            "| " + " | ".join(HEADER) + " |",
            "|---" * len(HEADER) + "|",
        ]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in group]
        lines += ["", *(f"* goal {goal}" for goal in goals if goal.case == case)]
    return "\n".join(lines) + "\n"


def plot(path: Path, rows: list[Row]) -> bool:
    """Bars of time per provider and case; False where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    cases = [list(group) for _, group in groupby(rows, key=lambda row: row.case)]
    figure, axes = pyplot.subplots(
        len(cases), 1, figsize=(8, 0.6 + 2.2 * len(cases)), squeeze=False
    )
    for axis, group in zip(axes[:, 0], cases, strict=True):
        shown = [row for row in group if row.ms]
        colours = [
            "#999999"
            if row.floor
            else "#c0392b"
            if row.wrong
            else "#2e86c1"
            if row.ours
            else "#d5b37a"
            for row in shown
        ]
        axis.barh([row.provider for row in shown], [row.ms for row in shown], color=colours)
        axis.set_title(group[0].case, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.invert_yaxis()
        axis.set_xlabel("ms", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True

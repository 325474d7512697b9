"""What a run shows while it works: a live table and bar on a terminal, plain lines (at most one a second) elsewhere."""

import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fastgrpo.trainer.data.foreign_text import presentable

COLUMNS = {
    "reward": ("reward", "{:.3f}"),
    "length": ("completions/mean_length", "{:.1f}"),
    "kl": ("kl", "{:.4f}"),
    "entropy": ("entropy", "{:.3f}"),
    "grad norm": ("grad_norm", "{:.2f}"),
    "equal groups": ("frac_reward_zero_std", "{:.0%}"),
    "s/step": ("step_time", "{:.2f}"),
}
"""Heading -> (metric, format) of the numbers shown per GRPO step."""
ROWS = 8
BLOCKS = "▁▂▃▄▅▆▇█"


class Display(Protocol):
    """Where a run reports to."""

    def phase(self, name: str, total: int) -> None:
        """Begins a part of the run that takes `total` steps."""

    def advance(
        self, done: int, text: str = "", numbers: Mapping[str, float] | None = None
    ) -> None:
        """`done` steps of the part are done; `numbers` are a GRPO step's metrics."""

    def note(self, text: str) -> None:
        """Something to read that stays."""

    def close(self) -> None:
        """Ends the display."""


def make_display() -> Display:
    """The display that suits standard output."""
    console = Console(highlight=False)
    return LiveDisplay(console) if console.is_terminal else PlainDisplay()


def short(numbers: Mapping[str, float]) -> str:
    """A GRPO step's numbers on one line."""
    shown = [(head, form, numbers.get(key)) for head, (key, form) in COLUMNS.items()]
    return "  ".join(
        f"{head} {form.format(value)}" for head, form, value in shown if value is not None
    )


def sparkline(values: deque[float], width: int = 40) -> str:
    """Values in 0..1 (or their own range, if wider) as a row of little bars."""
    recent = list(values)[-width:]
    top = max(1.0, *recent) if recent else 1.0
    return "".join(BLOCKS[max(0, min(len(BLOCKS) - 1, int(v / top * len(BLOCKS))))] for v in recent)


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class PlainDisplay:
    """One line per step, dropping those that come within a second of the last."""

    def __init__(self) -> None:
        self._name, self._total = "", 0
        self._began = self._last = 0.0

    def phase(self, name: str, total: int) -> None:
        """See `Display`."""
        self._name, self._total = name, total
        self._began, self._last = time.monotonic(), 0.0

    def advance(
        self, done: int, text: str = "", numbers: Mapping[str, float] | None = None
    ) -> None:
        """See `Display`."""
        now = time.monotonic()
        if now - self._last < 1.0 and done < self._total:
            return
        self._last = now
        spent = now - self._began
        left = spent / done * (self._total - done) if done else 0.0
        words = short(numbers) if numbers else text
        count = f"{done:>{len(str(self._total))}}/{self._total}"
        print(f"{self._name:<10} {count}  {words}  eta {clock(left)}", flush=True)

    def note(self, text: str) -> None:
        """See `Display`."""
        print(presentable(text), flush=True)

    def close(self) -> None:
        """See `Display`."""
        sys.stdout.flush()


class SilentDisplay:
    """Shows nothing: for all processes of a run but the first."""

    def phase(self, name: str, total: int) -> None:
        """See `Display`."""

    def advance(
        self, done: int, text: str = "", numbers: Mapping[str, float] | None = None
    ) -> None:
        """See `Display`."""

    def note(self, text: str) -> None:
        """See `Display`."""

    def close(self) -> None:
        """See `Display`."""


class LiveDisplay:
    """A table of the last steps above a progress bar."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("[bold]{task.description:<10}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[text]}"),
        )
        self._rows: deque[tuple[int, Mapping[str, float]]] = deque(maxlen=ROWS)
        self._rewards: deque[float] = deque(maxlen=400)
        self._task: TaskID | None = None
        self._live = Live(self._render(), console=console, refresh_per_second=4)
        self._live.start()

    def _render(self) -> Group:
        if not self._rows:
            return Group(self._progress)
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for head in ("step", *COLUMNS):
            table.add_column(head, justify="right")
        for step, numbers in self._rows:
            cells = [
                form.format(numbers[key]) if key in numbers else ""
                for key, form in COLUMNS.values()
            ]
            table.add_row(str(step), *cells)
        return Group(table, f"reward {sparkline(self._rewards)}", self._progress)

    def phase(self, name: str, total: int) -> None:
        """See `Display`."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=total, text="")

    def advance(
        self, done: int, text: str = "", numbers: Mapping[str, float] | None = None
    ) -> None:
        """See `Display`."""
        assert self._task is not None
        if numbers is not None:
            self._rows.append((done, dict(numbers)))
            self._rewards.append(numbers["reward"])
        self._progress.update(self._task, completed=done, text=text)
        self._live.update(self._render())

    def note(self, text: str) -> None:
        """See `Display`."""
        self._console.print(presentable(text), markup=False)

    def close(self) -> None:
        """See `Display`."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        self._live.update(self._render())
        self._live.stop()

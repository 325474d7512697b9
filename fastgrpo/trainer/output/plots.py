"""The report's curves as PNG pictures."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

Record = dict[str, float | str]


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot: records' `key` over their step."""

    label: str
    records: Sequence[Record]
    key: str
    marker: str = ""


def png(
    title: str,
    curves: Sequence[Curve],
    *,
    unit: str = "",
    log: bool = False,
    top: float | None = None,
) -> str | None:
    """A plot as the text of a `data:` URI, None if no curve has a point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.8, 2.7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = 0
    for curve in curves:
        points = [
            (r["step"], r[curve.key])
            for r in curve.records
            if isinstance(r.get(curve.key), float | int)
        ]
        if points:
            drawn += 1
            axes.plot(
                *zip(*points, strict=True),
                label=curve.label,
                marker=curve.marker,
                markersize=4,
                linewidth=1.6,
            )
    if not drawn:
        return None
    axes.set_title(title, fontsize=10, loc="left", fontweight="bold")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if log:
        axes.set_yscale("log")
    elif top is not None:
        axes.set_ylim(-0.02 * top, top * 1.04)
    if drawn > 1:
        axes.legend(fontsize=8, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

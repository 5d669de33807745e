"""The plots of the report, each a data URI for an `<img>`, drawn without a display."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Interval = Mapping[str, float | None]  # value, low, high

COLOURS = ("#8a94a6", "#e0912f", "#2563c9", "#2e9e6b", "#8b5cd6", "#c9418a")  # of runs, in their order
GREY, INK = "#5b6472", "#1d2430"
WIDTH_IN = 4.8  # of every picture: as wide as a phone, so that its letters stay readable there


def levels(names: Sequence[str], found: Sequence[Interval], label: str) -> str:
    """A point with its interval for each run, the first on top."""
    return _picture(lambda axes: _points(axes, names, found, COLOURS, label), len(names))


def differences(names: Sequence[str], found: Sequence[Interval], label: str) -> str:
    """A point with its interval for each pair of runs, and a line at 0; an interval that holds 0 is grey."""
    colours = [COLOURS[2] if _one_sided(interval) else COLOURS[0] for interval in found]

    def draw(axes: "Axes") -> None:
        axes.axvline(0, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        _points(axes, names, found, colours, label)

    return _picture(draw, len(names))


def bars(groups: Sequence[str], found: Mapping[str, Sequence[Interval]], label: str) -> str:
    """A bar with its interval for each run (the keys of `found`) in each group."""

    def draw(axes: "Axes") -> None:
        height = 0.8 / len(found)
        for i, (name, intervals) in enumerate(found.items()):
            rows = [row - 0.4 + (i + 0.5) * height for row in range(len(groups))]
            axes.barh(rows, _column(intervals, "value"), height * 0.9, color=COLOURS[i % len(COLOURS)], label=name)
            axes.hlines(rows, _column(intervals, "low"), _column(intervals, "high"), color=INK, linewidth=1.2)
        _rows(axes, groups, label)
        axes.set_xlim(left=0)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=min(len(found), 4),
            frameon=False,
            handlelength=0.8,
            fontsize=9,
        )

    return _picture(draw, max(2, len(groups) * len(found) // 2 + 1))


def curves(found: Mapping[str, Mapping[int, float]], points: Sequence[Mapping[str, float]], label: str) -> str:
    """A line over positions for each model, and `points` (position, examination, low, high) with their intervals."""

    def draw(axes: "Axes") -> None:
        for i, (name, curve) in enumerate(found.items()):
            axes.plot(list(curve), list(curve.values()), "o-", color=COLOURS[i % 6], label=name, markersize=3.5)
        if points:
            at, value, low, high = (_column(points, key) for key in ("position", "examination", "low", "high"))
            axes.vlines(at, low, high, color=INK, linewidth=1.2, zorder=3)
            axes.plot(at, value, "D", color=INK, markersize=4.5, label="shuffled pages", zorder=4)
        _plane(axes, "position", label)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, handlelength=1.4, fontsize=9)

    return _picture(draw, 7)


def _plane(axes: "Axes", across: str, up: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(across, color=GREY)
    axes.set_ylabel(up, color=GREY)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _quiet(axes, "y")


def _points(axes: "Axes", names: Sequence[str], found: Sequence[Interval], colours: Sequence[str], label: str) -> None:
    for row, interval in enumerate(found):
        colour = colours[row % len(colours)]
        axes.hlines(
            row, *_column([interval], "low"), *_column([interval], "high"), color=colour, linewidth=3, alpha=0.45
        )
        axes.plot(_column([interval], "value"), [row], "o", color=colour, markersize=7)
    _rows(axes, names, label)


def _rows(axes: "Axes", names: Sequence[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(label, color=GREY)
    _quiet(axes, "x")


def _quiet(axes: "Axes", across: Literal["x", "y"]) -> None:
    """Grid lines across one axis alone, and no frame but the floor."""
    axes.grid(axis=across, color="#e6e9ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c9ced6")


def _picture(draw: Callable[["Axes"], None], rows: int) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # A fixed salt and no date: the same report gives the same page, byte for byte.
    with rc_context({"svg.hashsalt": "disranker", "font.size": 10}):
        figure = Figure(figsize=(WIDTH_IN, 0.9 + 0.36 * rows), layout="constrained")
        draw(figure.add_subplot())
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(drawn.getvalue()).decode()


def _one_sided(interval: Interval) -> bool:
    low, high = interval["low"], interval["high"]
    return low is not None and high is not None and (low > 0 or high < 0)


def _column(intervals: Sequence[Interval], key: str) -> list[Any]:
    """What is not finite is not drawn."""
    return [float("nan") if interval[key] is None else interval[key] for interval in intervals]

"""The plots of the report, each a data URI for an `<img>`, drawn without a display."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Interval = Mapping[str, float | None]  # value, low, high

COLOURS = ("#8a94a6", "#e0912f", "#2563c9", "#2e9e6b", "#8b5cd6", "#c9418a")  # of runs, in their order
GREY, INK = "#5b6472", "#1d2430"
WIDTH_IN = 4.8  # of every picture: as wide as a phone, so that its letters stay readable there
LEGEND_IN = 3.3  # what the names of groups leave of it


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
    columns = legend_columns(list(found))

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
            ncols=columns,
            frameon=False,
            handlelength=0.8,
            fontsize=9,
        )

    return _picture(draw, max(2, len(groups) * len(found) // 2 + 1) + (len(found) - 1) // columns)


def legend_columns(names: Sequence[str]) -> int:
    """At most 4, and so few that a legend over the bars does not press them together."""
    longest = max(len(line) for name in names for line in name.split("\n"))
    return max(1, min(len(names), 4, int(LEGEND_IN / (0.35 + 0.075 * longest))))  # the mark, and 0.075 in a letter


def curves(found: Mapping[str, Mapping[int, float]], points: Sequence[Mapping[str, float]], label: str) -> str:
    """A line over positions for each model, and `points` (position, examination, low, high) with their intervals."""

    def draw(axes: "Axes") -> None:
        for i, (name, curve) in enumerate(found.items()):
            axes.plot(*_xy(curve), "o-", color=COLOURS[i % 6], label=name, markersize=3.5)
        if points:
            at, value, low, high = (_column(points, key) for key in ("position", "examination", "low", "high"))
            axes.vlines(at, low, high, color=INK, linewidth=1.2, zorder=3)
            axes.plot(at, value, "D", color=INK, markersize=4.5, label="shuffled pages", zorder=4)
        _plane(axes, "position", label, 10)
        axes.set_ylim(bottom=0)
        _legend(axes, 3)

    return _picture(draw, 7)


def losses(found: Mapping[int, float], label: str) -> str:
    """The loss by step, pale, and over it the mean of its neighbours, which shows where it goes."""

    def draw(axes: "Axes") -> None:
        steps, values = _xy(found)
        axes.plot(steps, values, color=COLOURS[2], alpha=0.3, linewidth=1)
        axes.plot(steps, means(values, max(1, len(values) // 20)), color=COLOURS[2], linewidth=2)
        _plane(axes, "step", label, 5)

    return _picture(draw, 5)


def means(values: Sequence[float], reach: int) -> list[float]:
    """Of each value and `reach` neighbours on either side, of fewer at the ends."""
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def validations(
    found: Mapping[str, Mapping[int, float]],
    best: tuple[int, float] | None,
    label: str,
    others: Mapping[str, float] | None = None,
) -> str:
    """A line over steps for each name of `found`, the first one strongest; `best` is a step and its value.

    `others` learn nothing, and are drawn as levels.
    """
    levels = others or {}

    def draw(axes: "Axes") -> None:
        for i, (name, values) in enumerate(found.items()):
            colour, width, order = COLOURS[(2, 0, 1, 4)[i % 4]], 1 if i else 2, 2 if i else 3
            axes.plot(*_xy(values), "o-", color=colour, linewidth=width, zorder=order, markersize=4, label=name)
        for i, (name, level) in enumerate(levels.items()):
            axes.axhline(level, color=COLOURS[(0, 1, 4)[i % 3]], linestyle="--", linewidth=1.2, label=name)
        if best:
            axes.plot(*best, "o", color=COLOURS[3], markersize=10, zorder=4, label="best")
        _plane(axes, "step", label, 5)
        _scale(axes, [*levels.values(), *(value for values in found.values() for value in values.values())])
        _legend(axes, len(found) + len(levels) + bool(best))

    return _picture(draw, 5)


def _scale(axes: "Axes", values: Sequence[float]) -> None:
    """By factors where a plain axis would show the largest value and press the rest onto the floor."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    if 0 < 10 * min(values) < max(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _plane(axes: "Axes", across: str, up: str, most: int) -> None:
    """Labels, and whole numbers at `most` places of the floor."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel(across, color=GREY)
    axes.set_ylabel(up, color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=most, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _quiet(axes, "y")


def _xy(curve: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return list(curve), list(curve.values())


def _legend(axes: "Axes", columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, handlelength=1.4, fontsize=9)


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

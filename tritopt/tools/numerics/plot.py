"""The picture of `tritopt numerics`: at most eight formats a panel, the rest is in the table. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tritopt.tools.numerics.digits import DIGITS
from tritopt.tools.numerics.record import FormatResult
from tritopt.tools.numerics.stress import ANY_OUTLIERS, GRADIENTS, RATES, SAME_OUTLIERS
from tritopt.tools.plotting import SUFFIXES as SUFFIXES
from tritopt.tools.plotting import Theme, check_path, save, spread, style, theme
from tritopt.tools.storage import TRUTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

MOST = 8
"""Number of formats in one panel."""
MAIN = ("split16", "master", "split8", "kahan", "stochastic", "none", "split16+bf16", "split8+int8")
"""Formats that the first two panels show, where they were measured; without any of them, the first eight."""
STATES = "fp32+"
"""Beginning of the names of formats that the third panel shows: those that differ in the states alone."""
PROBLEMS = {
    "gradients of any size": (tuple(GRADIENTS), "o"),
    "outliers": ((SAME_OUTLIERS, ANY_OUTLIERS), "D"),
    "digits": ((DIGITS,), "^"),
}
"""Cases of a problem, of which the worst is drawn, and its marker."""
FLOOR = 1e-6
"""Least drift that is drawn."""
GAP = 0.33
"""Distance of two labels, in powers of ten of the drift."""

Cases = Mapping[str, FormatResult]


def save_plot(results: Sequence[FormatResult], path: Path, dark: bool = False) -> None:
    """Draw drift by bytes moved, by learning rate, and by format of the states; PNG or SVG.

    Args:
        results: of a run, any optimizer and formats.
        path: file to write.
        dark: whether for a dark page.

    Raises:
        ValueError: the path. ImportError: no matplotlib.
    """
    check_path(path)
    import matplotlib
    from matplotlib.figure import Figure

    colors = theme(dark)
    formats = _by_format(results)
    shown = {name: formats[name] for name in MAIN if name in formats} or dict(list(formats.items())[:MOST])
    states = dict([item for item in formats.items() if item[0].startswith(STATES)][:MOST])
    with matplotlib.rc_context(style(colors)):
        # One below the other: as wide as a page of text, on which letters keep their size.
        rows = 3 if states else 2
        figure = Figure(figsize=(7.5, 4.5 * rows), layout="constrained")  # without pyplot no display is needed
        panels = figure.subplots(rows, 1)
        by_format = dict(zip(shown, colors.series, strict=False))
        _draw_price(panels[0], shown, by_format)
        _draw_rates(panels[1], shown, by_format)
        if states:
            _draw_states(panels[2], states, colors)
        steps = max(result.steps for result in results)
        figure.suptitle(
            f"{results[0].optimizer}, {steps} steps. Drift: distance from a float64 truth,\nas a share of its movement"
        )
        save(figure, path)


def _by_format(results: Sequence[FormatResult]) -> dict[str, dict[str, FormatResult]]:
    """Results by format and case, without the truth's and those of formats that were refused."""
    by_format: dict[str, dict[str, FormatResult]] = {}
    for result in results:
        if result.format != TRUTH.name and not result.refused:
            by_format.setdefault(result.format, {})[result.case] = result
    return by_format


def _worst(cases: Cases, names: Sequence[str]) -> float | None:
    known = [cases[name].drift for name in names if name in cases]
    drifts = [drift for drift in known if drift is not None and math.isfinite(drift)]
    return max(FLOOR, *drifts) if drifts else None


def _draw_price(axes: Axes, formats: Mapping[str, Cases], colors: Mapping[str, str]) -> None:
    """Bytes against drift, a labelled point a format."""
    points = []
    for name, cases in formats.items():
        moved = next((case.moved for case in cases.values() if case.case in GRADIENTS), None)
        drift = _worst(cases, tuple(GRADIENTS))
        if moved is not None and drift is not None:
            points.append((name, moved, drift))
            axes.plot([moved], [drift], "o", color=colors[name], markersize=9)
    _set_drift(axes, axes.yaxis)
    axes.set(title="Bytes against drift", xlabel="bytes that a step moves per parameter", ylim=(FLOOR / 2, 3))
    axes.set_ylabel("drift, worst over gradients of any size")
    axes.grid(which="major")
    if not points:
        return
    least, most = min(p[1] for p in points), max(p[1] for p in points)
    room = max(1.0, most - least)
    axes.set_xlim(least - 0.08 * room, most + 0.25 * room)
    for column in _columns(points, 0.02 * room):
        heights = spread([math.log10(drift) for *_, drift in column], GAP)
        for (name, moved, drift), height in zip(column, heights, strict=True):
            _label(axes, name, (moved, drift), (moved + 0.03 * room, 10**height), colors[name], "left")


def _columns(points: Sequence[tuple[str, float, float]], width: float) -> list[list[tuple[str, float, float]]]:
    """Points whose labels, `width` a letter, would stand beside each other's, together."""
    columns: list[list[tuple[str, float, float]]] = []
    end = -math.inf
    for point in sorted(points, key=lambda p: p[1]):
        if point[1] >= end:
            columns.append([])
        columns[-1].append(point)
        end = max(end, point[1] + width * len(point[0]))
    return columns


def _label(
    axes: Axes, text: str, point: tuple[float, float], place: tuple[float, float], color: str, align: str
) -> None:
    """Write a label beside a point, with a line to it where it had to move."""
    is_moved = align == "right" or abs(math.log10(place[1] / point[1])) > 0.05
    line = {"arrowstyle": "-", "color": color, "linewidth": 0.8} if is_moved else None
    axes.annotate(text, point, place, color=color, va="center", ha=align, arrowprops=line, fontsize=11)


def _set_drift(axes: Axes, axis: Axis) -> None:
    """Make an axis one of drifts: logarithmic, in per cent."""
    (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
    axis.set_major_formatter(lambda drift, _: f"{100 * drift:g}%")


def _draw_rates(axes: Axes, formats: Mapping[str, Cases], colors: Mapping[str, str]) -> None:
    """Drift by learning rate, lines labelled at their left end; lines that coincide have one label."""
    rates = sorted(RATES.items(), key=lambda item: item[1])
    lines: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for name, cases in formats.items():
        points = [(lr, cases[case].drift) for case, lr in rates if case in cases]
        known = tuple((lr, max(FLOOR, drift)) for lr, drift in points if drift is not None and math.isfinite(drift))
        if known:
            lines.setdefault(known, []).append(name)
    for line, names in lines.items():
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, linewidth=2, color=colors[names[0]])
    _set_drift(axes, axes.yaxis)
    axes.set(title="Drift by size of the updates", xlabel="learning rate: an update's share of the weight")
    axes.set(xscale="log", ylim=(FLOOR / 2, 3), xlim=(2e-8, 2e-2))
    axes.set_xticks(sorted(RATES.values()))
    axes.xaxis.minorticks_off()
    axes.grid(which="major")
    heights = spread([math.log10(line[0][1]) for line in lines], GAP)
    for (line, names), height in zip(lines.items(), heights, strict=True):
        _label(axes, ", ".join(names), line[0], (line[0][0] / 3, 10**height), colors[names[0]], "right")


def _draw_states(axes: Axes, formats: Mapping[str, Cases], colors: Theme) -> None:
    """Drift of formats of the states on each problem, best first."""
    order = sorted(formats, key=lambda name: _worst(formats[name], tuple(GRADIENTS)) or 0.0, reverse=True)
    for place, (problem, (cases, marker)) in enumerate(PROBLEMS.items()):
        drifts = [_worst(formats[name], cases) for name in order]
        points = [(drift, row) for row, drift in enumerate(drifts) if drift is not None]
        if points:
            color = colors.series[place]
            axes.plot(*zip(*points, strict=True), marker, linestyle="", color=color, markersize=9, label=problem)
    _set_drift(axes, axes.xaxis)
    axes.set(title="State formats, fp32 weights", xlabel="drift")
    axes.set_yticks(range(len(order)), [name.removeprefix(STATES) for name in order])
    axes.set_ylim(-0.6, len(order) + 1.1)  # room for the legend
    axes.grid(which="major")
    axes.legend(loc="upper left", frameon=False, fontsize=11, labelspacing=0.3)

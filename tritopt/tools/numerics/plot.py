"""The picture of `tritopt numerics`: at most eight formats a panel, the rest is in the table. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritopt.tools.numerics.digits import DIGITS
from tritopt.tools.numerics.record import FormatResult
from tritopt.tools.numerics.stress import ANY_OUTLIERS, GRADIENTS, RATES, SAME_OUTLIERS
from tritopt.tools.plotting import SUFFIXES as SUFFIXES
from tritopt.tools.plotting import Theme, check_path, save, spread, style, theme
from tritopt.tools.storage import TRUTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
        figure = Figure(figsize=(15 if states else 10, 5), layout="constrained")  # without pyplot no display is needed
        panels = figure.subplots(1, 3 if states else 2)
        by_format = dict(zip(shown, colors.series, strict=False))
        _draw_price(panels[0], shown, by_format)
        _draw_rates(panels[1], shown, by_format)
        if states:
            _draw_states(panels[2], states, colors)
        steps = max(result.steps for result in results)
        figure.suptitle(f"{results[0].optimizer}, {steps} steps: distance from a float64 truth, share of its movement")
        save(figure, path)


def _by_format(results: Sequence[FormatResult]) -> dict[str, dict[str, FormatResult]]:
    """Results by format and case, without the truth's and those of formats that were refused."""
    found: dict[str, dict[str, FormatResult]] = {}
    for result in results:
        if result.format != TRUTH.name and not result.refused:
            found.setdefault(result.format, {})[result.case] = result
    return found


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
    axes.set(title="Bytes against drift", xlabel="bytes that a step moves per parameter", yscale="log")
    axes.set(ylabel="drift, worst over gradients of any size", ylim=(FLOOR / 2, 3))
    if points:
        least, most = min(p[1] for p in points), max(p[1] for p in points)
        axes.set_xlim(least - 1, most + 0.3 * (most - least) + 2)
    axes.grid(which="major")
    heights = spread([math.log10(drift) for *_, drift in points], 0.33)
    for (name, moved, drift), height in zip(points, heights, strict=True):
        is_moved = abs(height - math.log10(drift)) > 0.05
        line: dict[str, Any] = {"arrowstyle": "-", "color": colors[name], "linewidth": 0.8} if is_moved else {}
        place = (moved + 0.5, 10**height)
        axes.annotate(
            name, (moved, drift), place, color=colors[name], va="center", arrowprops=line or None, fontsize=10.5
        )


def _draw_rates(axes: Axes, formats: Mapping[str, Cases], colors: Mapping[str, str]) -> None:
    """Drift by learning rate, lines labelled at their left end; lines that coincide have one label."""
    lines: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for name, cases in formats.items():
        points = [(lr, cases[case].drift) for case, lr in sorted(RATES.items(), key=lambda item: item[1]) if case in cases]
        known = tuple((lr, max(FLOOR, drift)) for lr, drift in points if drift is not None and math.isfinite(drift))
        if known:
            lines.setdefault(known, []).append(name)
    for line, names in lines.items():
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, linewidth=2, color=colors[names[0]])
    axes.set(title="Drift by size of the updates", xlabel="learning rate: an update's share of the weight")
    axes.set(xscale="log", yscale="log", ylim=(FLOOR / 2, 3), xlim=(3e-9, 2e-2))
    axes.set_xticks(sorted(RATES.values()))
    axes.grid(which="major")
    heights = spread([math.log10(line[0][1]) for line in lines], 0.33)
    for (line, names), height in zip(lines.items(), heights, strict=True):
        color = colors[names[0]]
        axes.annotate(
            ", ".join(names), line[0], (line[0][0] / 3, 10**height), color=color, va="center", ha="right", fontsize=10.5,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8},
        )  # fmt: skip


def _draw_states(axes: Axes, formats: Mapping[str, Cases], colors: Theme) -> None:
    """Drift of formats of the states on each problem, best first."""
    order = sorted(formats, key=lambda name: _worst(formats[name], tuple(GRADIENTS)) or 0.0, reverse=True)
    for place, (problem, (cases, marker)) in enumerate(PROBLEMS.items()):
        drifts = [_worst(formats[name], cases) for name in order]
        points = [(drift, row) for row, drift in enumerate(drifts) if drift is not None]
        if points:
            color = colors.series[place]
            axes.plot(*zip(*points, strict=True), marker, linestyle="", color=color, markersize=9, label=problem)
    axes.set(title="State formats, fp32 weights", xlabel="drift", xscale="log")
    axes.set_yticks(range(len(order)), [name.removeprefix(STATES) for name in order])
    axes.set_ylim(-0.6, len(order) + 0.6)
    axes.grid(which="major")
    axes.legend(loc="upper left", frameon=False, ncols=1, fontsize=10, labelspacing=0.3)

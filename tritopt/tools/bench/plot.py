"""The picture of `tritopt bench`: time against bytes that must move, under the roof of a copy. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tritopt.tools.bench.measure import OURS, Measurement

SUFFIXES = (".png", ".svg")
COLUMNS = 5
"""Number of columns of the legend."""
MARKERS = ("o", "s", "^", "v", "D", "P", "X", "*", "<", ">")


def check_path(path: Path) -> None:
    """Raise ValueError for a path that no plot goes to, ImportError without matplotlib: before time is spent."""
    if path.suffix not in SUFFIXES or not path.parent.is_dir():
        raise ValueError(f"{path} must be a {' or '.join(SUFFIXES)} file in a folder that exists")
    if find_spec("matplotlib") is None:
        raise ImportError("the plot needs matplotlib: pip install matplotlib")


def save_plot(rows: Sequence[Measurement], copy: float, title: str, path: Path) -> None:
    """Draw milliseconds and GB/s against bytes, a point for each row that has numbers; PNG or SVG.

    Args:
        rows: measurements of a run.
        copy: bytes per second of a copy, the roof.
        title: title of the picture: the GPU, and whether it is a rehearsal.
        path: file to write.

    Raises:
        ValueError: the path, or no row has numbers. ImportError: no matplotlib.
    """
    check_path(path)
    points = [(row, row.moved, ms) for row in rows if row.moved and (ms := row.device_ms or row.ms)]
    if not points:
        raise ValueError("nothing was measured that could be drawn")
    import matplotlib
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(_label(row) for row, *_ in points))
    height = 6 + 0.18 * (len(names) // COLUMNS)
    figure = Figure(figsize=(13, height), layout="constrained")  # without pyplot no display is needed
    times, rates = figure.subplots(1, 2)
    least, most = min(moved for _, moved, _ in points) / 2, 2 * max(moved for _, moved, _ in points)
    times.plot([least, most], [1e3 * least / copy, 1e3 * most / copy], color="black", linewidth=1, label="a copy")
    rates.axhline(copy / 1e9, color="black", linewidth=1)
    for i, name in enumerate(names):
        own = [(moved, ms) for row, moved, ms in points if _label(row) == name]
        style: dict[str, Any] = {"marker": MARKERS[i // 10 % len(MARKERS)], "color": f"C{i % 10}", "linestyle": ""}
        if not name.startswith(OURS):
            style["markerfacecolor"] = "none"
        times.plot([moved for moved, _ in own], [ms for _, ms in own], label=name, **style)
        rates.plot([moved for moved, _ in own], [moved / ms / 1e6 for moved, ms in own], **style)
    for axes in (times, rates):
        axes.set(xlabel="bytes that must move, read and written", xscale="log")
        axes.grid(which="major", alpha=0.3)
    times.set(title="time of a step", ylabel="ms", yscale="log")
    top = 1.1 * max(copy / 1e9, *(moved / ms / 1e6 for _, moved, ms in points))
    rates.set(title="bytes that must move per second; the line: a copy", ylabel="GB/s", ylim=(0, top))
    handles, labels = times.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), COLUMNS), fontsize=8)
    figure.suptitle(title)
    with matplotlib.rc_context({"svg.hashsalt": "tritopt", "svg.fonttype": "none"}):  # same bytes each time
        figure.savefig(path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)


def _label(row: Measurement) -> str:
    if row.contestant != OURS:
        return f"{row.contestant}, {row.optimizer}"
    return f"{row.contestant}, {row.optimizer}, {row.format}"

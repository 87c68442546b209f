"""The picture of `tritopt numerics`. Needs matplotlib, which nothing else here does."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from tritopt.tools.numerics.record import FormatResult
from tritopt.tools.numerics.stress import ANY_OUTLIERS, GRADIENTS, RATES, SAME_OUTLIERS
from tritopt.tools.storage import TRUTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".png", ".svg")
DASHES, MARKERS = ("-", "--", ":", "-."), ("o", "s", "^", "v")
OUTLIERS = (SAME_OUTLIERS, ANY_OUTLIERS)


def check_path(path: Path) -> None:
    """Raise ValueError for a path that no plot goes to, ImportError without matplotlib: before time is spent."""
    if path.suffix not in SUFFIXES or not path.parent.is_dir():
        raise ValueError(f"{path} must be a {' or '.join(SUFFIXES)} file in a folder that exists")
    if find_spec("matplotlib") is None:
        raise ImportError("the plot needs matplotlib: pip install 'tritopt[numerics]'")


def save_plot(results: Sequence[FormatResult], path: Path) -> None:
    """Draw drift by learning rate, size of updates by size of gradients, drift by bytes moved; PNG or SVG."""
    check_path(path)
    import matplotlib
    from matplotlib.figure import Figure

    formats = [name for name in dict.fromkeys(result.format for result in results) if name != TRUTH.name]
    figure = Figure(figsize=(15, 6), layout="constrained")  # without pyplot no display is needed
    drift, update, price = figure.subplots(1, 3)
    for i, name in enumerate(formats):
        own = {result.case: result for result in results if result.format == name}
        color, turn = f"C{i % 10}", i // 10 % len(DASHES)
        marker = {"color": color, "marker": MARKERS[turn], "markersize": 5}
        style = {**marker, "linestyle": DASHES[turn]}
        _line(drift, [(lr, own[case].drift) for case, lr in RATES.items()], name, style)
        _line(update, [(rms, own[case].update) for case, rms in GRADIENTS.items()], name, style)
        moved = own[next(iter(GRADIENTS))].moved
        for cases, fill in ((tuple(GRADIENTS), color), (OUTLIERS, "none")):
            worst = max((value for case in cases if (value := own[case].drift) is not None), default=None)
            if worst is not None and moved is not None:
                price.plot([moved], [worst], linestyle="", markerfacecolor=fill, **marker)
    drift.set(title="drift", xlabel="learning rate: an update's share of the weight", xscale="log")
    update.set(title="size of updates", xlabel="rms of the gradients", xscale="log")
    update.set(ylabel="rms, as a share of the truth's", yscale="log", ylim=(1e-3, 10))
    price.set(title="drift, filled: gradients of any rms, hollow: outliers", xlabel="bytes moved per parameter")
    for axes in (drift, price):
        axes.set(ylabel="distance from the truth, as a share of its movement", yscale="log")
    for axes in (drift, update, price):
        axes.grid(which="major", alpha=0.3)
    columns = min(len(formats), 7)
    figure.legend(*drift.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8)
    figure.suptitle(f"{results[0].optimizer}: storage formats, {max(result.steps for result in results)} steps")
    with matplotlib.rc_context({"svg.hashsalt": "tritopt", "svg.fonttype": "none"}):  # same bytes each time
        figure.savefig(path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)


def _line(axes: Axes, points: Sequence[tuple[float, float | None]], name: str, style: dict[str, object]) -> None:
    known = [(x, y) for x, y in points if y is not None]
    axes.plot([x for x, _ in known], [y for _, y in known], label=name, **style)  # type: ignore[arg-type]

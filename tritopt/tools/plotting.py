"""Parts that pictures share: paths, colours of light and dark pages, labels that do not overlap. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
"""Eight colours that colour-blind people can tell apart (Okabe & Ito 2008, Color Universal Design)."""


class Theme(NamedTuple):
    """Colours of a page."""

    ink: str
    """Colour of text and axes."""
    paper: str
    """Colour behind what must be readable on top of lines; the page itself stays transparent."""
    faint: str
    """Colour of the grid."""
    series: tuple[str, ...]
    """Colours of lines, eight of them."""


LIGHT = Theme("#222222", "#FFFFFF", "#DDDDDD", (*OKABE_ITO[:6], "#8C6D00", "#000000"))
"""Yellow is too pale for lines on white: a dark ochre of the same hue stands for it."""
DARK = Theme("#E4E4E4", "#1E2129", "#454A57", ("#4BA3DB", *OKABE_ITO[1:7], "#FFFFFF"))
"""Blue and black are too dark on dark paper: a lighter blue and white stand for them."""


def theme(dark: bool) -> Theme:
    """Choose the colours of a light or a dark page."""
    return DARK if dark else LIGHT


def check_path(path: Path) -> None:
    """Raise ValueError for a path that no plot goes to, ImportError without matplotlib: before time is spent."""
    if path.suffix not in SUFFIXES or not path.parent.is_dir():
        raise ValueError(f"{path} must be a {' or '.join(SUFFIXES)} file in a folder that exists")
    if find_spec("matplotlib") is None:
        raise ImportError("the plot needs matplotlib: pip install matplotlib")


def style(colors: Theme) -> Any:
    """Settings of matplotlib under which a figure is made and saved: the same bytes each time, text that stays text."""
    return {
        "svg.hashsalt": "tritopt",
        "svg.fonttype": "none",
        "font.family": ["DejaVu Sans", "sans-serif"],
        "font.size": 12,
        "text.color": colors.ink,
        "axes.labelcolor": colors.ink,
        "axes.edgecolor": colors.ink,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 13,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "figure.facecolor": "none",
        "figure.titlesize": 12,
        "grid.color": colors.faint,
        "xtick.color": colors.ink,
        "ytick.color": colors.ink,
    }


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a file, without a date."""
    figure.savefig(path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Move heights apart, so that neighbours are `gap` apart at least, as little as need be and in their order.

    >>> spread([0.0, 1.0, 1.1], 0.5)
    [0.0, 0.8, 1.3]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    clusters: list[list[int]] = []
    for i in order:
        clusters.append([i])
        while len(clusters) > 1 and _bottom(clusters[-1], wanted, gap) < _top(clusters[-2], wanted, gap) + gap:
            last = clusters.pop()
            clusters[-1] += last
    places = [0.0] * len(wanted)
    for cluster in clusters:
        bottom = _bottom(cluster, wanted, gap)
        for turn, i in enumerate(cluster):
            places[i] = round(bottom + turn * gap, 6)
    return places


def _bottom(cluster: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    return sum(wanted[i] for i in cluster) / len(cluster) - gap * (len(cluster) - 1) / 2


def _top(cluster: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    return _bottom(cluster, wanted, gap) + gap * (len(cluster) - 1)

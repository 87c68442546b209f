"""The picture of `tritopt list --plot`: where the bytes of a step go, by format. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tritopt.mxnet.optimizer import Optimizer
from tritopt.tools.cost import Traffic, traffic_by_tensor
from tritopt.tools.optimizers import torch_classes
from tritopt.tools.plotting import Theme, check_path, save, style, theme
from tritopt.tools.storage import find_formats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("fp32", "master", "split16", "split8", "stochastic", "none", "split16+bf16", "split8+int8")
"""Formats that are drawn, where the optimizer takes them."""
PALE = 0.55
"""Opacity of what is written."""


def save_plot(classes: Sequence[type[Optimizer]], path: Path, dark: bool = False) -> None:
    """Draw a bar for each format, one panel for each optimizer: bytes per parameter, by the tensor that they are of.

    Args:
        classes: registered optimizers that have a kernel.
        path: file to write.
        dark: whether for a dark page.

    Raises:
        ValueError: the path, or an optimizer without a kernel. ImportError: no matplotlib.
    """
    check_path(path)
    import matplotlib
    from matplotlib.figure import Figure

    colors = theme(dark)
    bars = [(cls.__name__, bars_of(cls)) for cls in classes]
    with matplotlib.rc_context(style(colors)):
        height = sum(1.5 + 0.42 * len(of_class) for _, of_class in bars)
        figure = Figure(figsize=(7.5, height), layout="constrained")  # without pyplot no display is needed
        ratios = [1.5 + 0.42 * len(of_class) for _, of_class in bars]
        panels = figure.subplots(len(bars), 1, squeeze=False, gridspec_kw={"height_ratios": ratios})
        for axes, (name, of_class) in zip(panels[:, 0], bars, strict=True):
            _draw(axes, name, of_class, colors)
        save(figure, path)


def bars_of(cls: type[Optimizer]) -> dict[str, dict[str, Traffic]]:
    """Bytes per parameter, by format and by tensor: `traffic_by_tensor` for each format that the optimizer takes."""
    traffic_of = {}
    for storage in find_formats(FORMATS):
        try:
            opt = cls(**storage.rule_arguments)
            traffic_of[storage.name] = traffic_by_tensor(opt, storage.dtype, storage.dtype, storage.weight_format)
        except ValueError:
            if not cls().phases:
                raise
    return traffic_of


def _draw(axes: Axes, name: str, bars: dict[str, dict[str, Traffic]], colors: Theme) -> None:
    names = getattr(torch_classes().get(name), "state_keys", {})
    first = ("gradient", "weight", "master")
    states = dict.fromkeys(tensor for parts in bars.values() for tensor in parts if tensor not in first)
    tensors = [*first, *states]
    for row, parts in enumerate(bars.values()):
        left = 0.0
        for tensor, traffic in parts.items():
            color = colors.series[tensors.index(tensor) % len(colors.series)]
            for n_bytes, alpha in ((traffic.read, 1.0), (traffic.written, PALE)):
                if n_bytes:
                    axes.barh(row, n_bytes, 0.72, left, color=color, alpha=alpha, edgecolor=colors.paper, linewidth=1)
                    if n_bytes >= 0.9:  # room for a digit
                        ink = _ink(color, alpha, colors)
                        axes.text(left + n_bytes / 2, row, f"{n_bytes:.2g}", ha="center", va="center", color=ink,
                                  fontsize=10)  # fmt: skip
                    left += n_bytes
        axes.text(left + 0.3, row, f"{left:.3g}", va="center", fontweight="bold")
    for i, tensor in enumerate(tensors):
        axes.barh(0, 0, color=colors.series[i % len(colors.series)], label=names.get(tensor, tensor))
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set(title=f"{name}: bytes of a step per parameter", xlabel="read (full colour), then written (faint)")
    axes.spines["left"].set_visible(False)
    axes.tick_params("y", length=0)
    axes.legend(loc="lower right", frameon=False)


def _ink(color: str, alpha: float, colors: Theme) -> str:
    """Black or white, whichever is easier to read on a colour over the page."""
    from matplotlib.colors import to_rgb

    mixed = [alpha * a + (1 - alpha) * b for a, b in zip(to_rgb(color), to_rgb(colors.paper), strict=True)]
    luminance = sum(weight * part**2.2 for weight, part in zip((0.2126, 0.7152, 0.0722), mixed, strict=True))
    return "black" if luminance > 0.18 else "white"

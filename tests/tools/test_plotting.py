"""Pictures: labels that do not overlap, colours that can be told apart, and where the bytes of a step go."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import tritopt
from tritopt.commands.app import app
from tritopt.tools import cost_plot
from tritopt.tools.cost import bytes_per_parameter
from tritopt.tools.plotting import DARK, LIGHT, SUFFIXES, Theme, spread
from tritopt.tools.storage import FORMATS

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "images"


@given(st.lists(st.floats(-5, 5), max_size=12), st.floats(0.01, 1))
def test_spread(wanted: list[float], gap: float) -> None:
    places = spread(wanted, gap)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert all(places[b] - places[a] >= gap - 1e-5 for a, b in pairwise(order))
    if all(wanted[b] - wanted[a] >= gap for a, b in pairwise(order)):  # nothing had to move
        assert places == pytest.approx(wanted, abs=1e-5)


def luminance(color: str) -> float:
    """Relative luminance of a colour, as WCAG 2.1 defines it."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_lines_stand_out_from_the_page(theme: Theme) -> None:
    assert len(set(theme.series)) == 8
    for color in theme.series:
        bright, dim = sorted((luminance(color), luminance(theme.paper)), reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 2, color


def test_bars_are_the_bytes_of_the_formats() -> None:
    bars = cost_plot.bars_of(tritopt.AdamW)
    assert list(bars) == list(cost_plot.FORMATS)
    for name, parts in bars.items():
        storage = FORMATS[name]
        opt = tritopt.AdamW(**storage.rule_arguments)
        expected = bytes_per_parameter(opt, storage.dtype, storage.dtype, storage.weight_format)
        assert sum(part.total for part in parts.values()) == expected.total
    assert "split8" not in cost_plot.bars_of(tritopt.Adafactor)  # which it refuses


def test_an_optimizer_without_a_kernel_has_no_bytes() -> None:
    class OnTheHost(tritopt.Optimizer):
        def create_state(self, index: object, weight: torch.Tensor) -> None:
            return None

    with pytest.raises(ValueError, match="OnTheHost declares no phases"):
        cost_plot.bars_of(OnTheHost)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_picture_of_bytes(dark: bool, suffix: str, tmp_path: Path) -> None:
    """docs/images has what is drawn."""
    pytest.importorskip("matplotlib")
    path = tmp_path / f"bytes{suffix}"
    result = CliRunner().invoke(app, ["list", "adamw", "--plot", str(path), *(["--dark"] if dark else [])])
    assert result.exit_code == 0, result.output
    if suffix == ".png":
        assert path.read_bytes().startswith(b"\x89PNG")
        return
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())
    assert {*cost_plot.FORMATS, "gradient", "weight", "master", "exp_avg", "exp_avg_sq", "30", "12.1"} <= set(texts)
    committed = (IMAGES / f"bytes_{'dark' if dark else 'light'}.svg").read_text()
    assert re.findall(r"<text[^>]*>([^<]*)</text>", committed) == texts


def test_a_path_that_no_picture_goes_to_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["list", "adamw", "--plot", str(tmp_path / "bytes.pdf")])
    assert result.exit_code == 2
    assert "must be a .png or .svg file" in " ".join(result.output.replace("│", " ").split())

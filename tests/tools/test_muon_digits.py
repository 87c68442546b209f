"""Muon and AdamW on the digits: `Mixed` beside torch's two classes, in some formats, and with NorMuon."""

from __future__ import annotations

import pytest

from tritopt.tools.numerics.digits import Digits
from tritopt.tools.numerics.muon_digits import FORMATS_BESIDE, TORCHS, muon_digits


def test_mixed_learns_the_digits_as_torchs_classes_do() -> None:
    """Runs part by roundings of bf16 products: losses were within 2% of torch's when this was written."""
    pytest.importorskip("sklearn")
    results = {one.name: one for one in muon_digits(Digits.load(), 60)}
    assert list(results) == [TORCHS, *(f"Mixed, {name}" for name in FORMATS_BESIDE), "Mixed with beta2, fp32"]
    torchs = results[TORCHS]
    assert torchs.loss < 1.5
    for one in results.values():
        assert one.loss == pytest.approx(torchs.loss, rel=0.05)
        assert one.accuracy > 0.85

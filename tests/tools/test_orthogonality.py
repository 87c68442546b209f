"""Muon's iteration beside the decomposition: what the table of `tritopt numerics --optimizer Muon` says."""

from __future__ import annotations

from tritopt.tools.numerics import orthogonality


def test_more_steps_and_better_coefficients_come_nearer() -> None:
    results = {(one.coefficients, one.steps, one.dtype): one for one in orthogonality()}
    quintic = next(name for name, *_ in results if name != "polar_express")
    for dtype in ("bf16", "fp32"):
        for name in (quintic, "polar_express"):
            errors = [results[name, steps, dtype].error for steps in (3, 5)]
            assert errors[1] < errors[0]
        assert results["polar_express", 5, dtype].error < results[quintic, 5, dtype].error
        assert 0.65 < results[quintic, 5, dtype].lowest < results[quintic, 5, dtype].highest < 1.25
    # Seven steps of Polar Express are orthogonal up to the dtype of the products.
    exact, rounded = (results["polar_express", 7, dtype] for dtype in ("fp32", "bf16"))
    assert exact.error < 1e-3
    assert rounded.error < 0.05
    assert abs(exact.highest - 1) < 1e-3

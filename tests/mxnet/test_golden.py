"""tritopt follows trajectories recorded from MXNet; tests/data/golden/README.md says where they come from.

Set TRITOPT_GOLDEN to the directory of a full set to replay all of it, in full.
"""

import dataclasses
import json
import math
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console

import tritopt
from tests.support.golden_cases import (
    BUNDLED,
    PATHS,
    GoldenCase,
    compare,
    fused_device,
    load_cases,
    replay,
    run_all,
    table_of,
)

FULL_SET = os.environ.get("TRITOPT_GOLDEN")
CASES = load_cases(Path(FULL_SET) if FULL_SET else BUNDLED, tritopt.names())
BUNDLED_CASES = load_cases()


def steps_to_replay(case: GoldenCase, path: str) -> int | None:
    """None for all; cases of many tensors are cut short, since an interpreted launch takes milliseconds for each."""
    return 2 if path == "fused" and len(case.w0) > 2 and not FULL_SET else None


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_replay_follows_mxnet(case: GoldenCase, path: str) -> None:
    device = fused_device() if path == "fused" else "cpu"
    result = replay(case, path == "fused", steps_to_replay(case, path), device)
    assert compare(case, result).violations == []


def test_every_bundled_optimizer_is_registered() -> None:
    assert {case.optimizer.lower() for case in BUNDLED_CASES} <= set(tritopt.names())


def test_set_aside_cases_are_known() -> None:
    set_aside = Counter(decision for case in BUNDLED_CASES for decision in case.decisions())
    assert set_aside == {"M6": 11, "M7": 12, "M8": 19, "M21": 16, "M24": 28}


def test_bundled_flags_have_an_optimizer_that_keeps_to_them() -> None:
    manifest = json.loads((BUNDLED / "manifest.json").read_text())
    followed = {flag for case in BUNDLED_CASES if not case.decisions() for flag in case.flags}
    # MXNet's product of all tensors is in every case with that flag, and in none without.
    assert followed | {"nadam_shared_schedule"} == {
        flag for case in manifest["cases"] for flag in case.get("flags", [])
    }


@pytest.fixture(scope="module")
def adam_case() -> GoldenCase:
    """One with master weights, two states and all steps active."""
    return next(c for c in BUNDLED_CASES if c.optimizer == "Adam" and c.dtype == torch.float16 and c.tag == "grid")


def test_compare_measures_against_the_distance_moved(adam_case: GoldenCase) -> None:
    result = replay(adam_case, use_fused_step=False)
    assert compare(adam_case, result).violations == []
    moved = (adam_case.weights[0][0].double() - adam_case.w0[0].double()).abs().max()
    result.weights[0][0] += 0.05 * moved
    assert "step 0, weight 0" in compare(adam_case, result).violations[0]


def test_compare_notices_nan_states_counts_and_dtypes(adam_case: GoldenCase) -> None:
    result = replay(adam_case, use_fused_step=False)
    result.weights[2][1][:] = math.nan
    result.states[0][1] *= 1.001
    result.states[1][2] = result.states[1][2].double()
    result.states[2].pop()
    result = dataclasses.replace(result, num_update=result.num_update + 1)
    comparison = compare(adam_case, result)
    assert comparison.worst == math.inf
    starts = ["step 2, weight 1", "mean of weight 0", "var of weight 1", "weight 2 has 2 states", "num_update is 9"]
    assert len(comparison.violations) == len(starts)
    for violation, start in zip(comparison.violations, starts, strict=True):
        assert violation.startswith(start)


def test_compare_notices_another_learning_rate() -> None:
    case = next(case for case in BUNDLED_CASES if case.tag == "staggered" and not case.decisions())
    result = replay(case, use_fused_step=False)
    result.lr_trace[1][0] = 0.5
    result.lr_trace[1][1] = 0.5
    assert [violation[:31] for violation in compare(case, result).violations] == ["step 1, learning rate of weight"] * 2


def test_table_counts_cases(adam_case: GoldenCase) -> None:
    console = Console(width=120, record=True, quiet=True)
    rows = run_all([adam_case], ["step"], steps=2, console=console)
    assert [(name, row.run, row.passed) for name, row in rows.items()] == [("Adam step", 1, 1)]
    assert table_of(rows).row_count == 1

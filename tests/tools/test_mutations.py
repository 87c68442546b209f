"""`tritopt check` notices broken formulas; `python -m tests.mutations` breaks what else there is."""

from __future__ import annotations

import os

import pytest
import torch

from tests import mutations
from tests.mutations import Mutation
from tritopt.kernels.language import HAS_TRITON, INTERPRETED
from tritopt.mxnet import registry
from tritopt.tools.check import Case, CheckResult, check_case, find_cases

if not (HAS_TRITON and INTERPRETED):
    pytest.skip("kernels are compiled here", allow_module_level=True)

WHICH = os.environ.get("TRITOPT_TEST_MUTATIONS", "some")
"""all: every text that is known to be wrong. Some of them: those of what optimizers share, and each one's first."""


def chosen() -> list[Mutation]:
    of_kernels = [mutation for mutation in mutations.collect() if "/" not in mutation.optimizer]
    if WHICH == "all":
        return of_kernels
    n_shared = sum(len(texts) for *_, texts in mutations.SHARED)
    own = {mutation.optimizer: mutation for mutation in reversed(of_kernels[n_shared:])}
    return [*of_kernels[:n_shared], *own.values()]


def cases(name: str) -> list[Case]:
    """A quick check's, of which those come first that show most: one of each variant, with every option."""
    cases = find_cases([registry.find(name)], quick=True)
    return sorted(cases, key=lambda case: case.weight_dtype != torch.float32 or case.option == "plain")


def first_failure(name: str) -> CheckResult | None:
    rows = (check_case(case, 2) for case in cases(name))
    return next((row for row in rows if not row.passed), None)


def test_every_optimizer_has_some() -> None:
    shipped = {name for name, cls in registry.registered().items() if cls.__module__.startswith("tritopt.")}
    assert {mutation.optimizer for mutation in chosen()} >= shipped


@pytest.mark.parametrize("mutation", chosen(), ids=lambda mutation: f"{mutation.optimizer}-{mutation.wrong}")
def test_a_broken_formula_is_noticed(mutation: Mutation) -> None:
    with mutations.interpreted(mutation):
        row = first_failure(mutation.optimizer)
    assert row is not None
    assert "differ by" in row.reason


def test_nothing_stays_broken() -> None:
    case = cases("adamw")[0]
    with mutations.interpreted(next(mutation for mutation in chosen() if mutation.optimizer == "adamw")):
        assert not check_case(case).passed
    assert check_case(case).passed

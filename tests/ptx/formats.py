"""`tritopt check` in the machine, of optimizers with every master and state format. test_steps.py runs this file."""

from __future__ import annotations

import numpy as np
import pytest

from tritopt import check
from tritopt.check import Case
from tritopt.tools.ptx.driver import Record

NAMES = ("adamw", "lamb", "groupadagrad", "adafactor", "sgld", "lion")


def is_special(case: Case) -> bool:
    """Whether it is stored otherwise than steps.py has it; and no variant, which has the same formats."""
    return not case.variant and (case.master not in (None, "fp32") or case.state_dtype is not None)


def name_of(case: Case) -> str:
    return "-".join((case.cls.__name__, case.master or "none", case.state_dtype or "fp32"))


CASES = [case for case in check.cases(check.registered(NAMES)) if is_special(case)]
MOST = [case for case in CASES if case.cls.__name__ in ("AdamW",) and case.state_dtype == "int8"]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_format(record: Record, case: Case) -> None:
    """Two steps with decay, a clip bound and rescaling: the reference and a truth in fp64, in the tolerances' table."""
    record.order, record.warp_seed = np.random.default_rng(0).permutation, 1
    row = check.check_case(case, n_steps=2)
    assert row.passed, row.reason
    assert record.launches.total() >= 2


@pytest.mark.parametrize("case", MOST, ids=name_of)
@pytest.mark.parametrize("record", [80, 100], indirect=True)
def test_other_gpus(record: Record, case: Case) -> None:
    row = check.check_case(case, n_steps=2)
    assert row.passed, row.reason
    assert record.launches.total() >= 2

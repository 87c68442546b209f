"""`tritopt check` in the machine, of optimizers with every master and state format. test_steps.py runs this file."""

from __future__ import annotations

import numpy as np
import pytest

import tritopt
from tritopt.engine.tuning.config import GENERIC
from tritopt.tools import check
from tritopt.tools.check import Case
from tritopt.tools.ptx.driver import Record

STATES = {"lamb": ("bf16", "int8"), "lion": ("fp16", "fp8")}
"""Formats of states that are run, each of which has code of its own that all optimizers share; AdamW has all."""


def is_chosen(case: Case) -> bool:
    """Whether it is stored otherwise than steps.py has it; and no variant, which has the same formats."""
    if case.state_dtype is not None:
        is_taken = case.state_dtype in STATES.get(case.cls.__name__.lower(), (case.state_dtype,))
        return is_taken and (case.master is not None or case.cls is tritopt.AdamW) and not case.variant
    # With states of other formats these two have both splits.
    is_had = case.cls.__name__.lower() in STATES and case.master in ("split16", "split8")
    return case.master not in (None, "fp32") and not case.variant and not is_had


def name_of(case: Case) -> str:
    return f"{case.cls.__name__}-{case.master or 'none'}-{case.state_dtype or 'fp32'}"


NAMES = ("adamw", "lamb", "groupadagrad", "adafactor", "sgld", "lion")
CASES = [case for case in check.find_cases(check.registered(NAMES)) if is_chosen(case)]


SHORT_CHUNKS = GENERIC._replace(chunk_size=2048)
"""Make several chunks of tensors that are soon done."""


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_every_format(record: Record, case: Case) -> None:
    """Two steps with decay, a clip bound and rescaling: the reference and a truth in fp64, in the tolerances' table."""
    record.order = np.random.default_rng(0).permutation
    record.warp_seed = 1 if case.cls is tritopt.AdamW else None
    row = check.check_case(case, n_steps=2, config=SHORT_CHUNKS)
    assert row.passed, row.reason
    assert record.launches.total() >= 2


@pytest.mark.parametrize("record", [80, 100], indirect=True)
def test_other_gpus(record: Record) -> None:
    case = next(case for case in CASES if name_of(case) == "AdamW-split8-int8")
    row = check.check_case(case, n_steps=2, config=SHORT_CHUNKS)
    assert row.passed, row.reason
    assert record.launches.total() >= 2

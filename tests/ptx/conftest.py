"""The machine that a test runs kernels in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tritopt.tools.ptx.driver import Record, switch_on


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Iterator[Record]:
    """Launches of this test; `indirect` parameters say which GPU they are compiled for."""
    with switch_on(getattr(request, "param", 90)) as record:
        yield record
    assert record.faults == []

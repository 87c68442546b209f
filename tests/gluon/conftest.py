"""A world of two processes, shared by all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.world import REASON, World


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    if REASON:
        pytest.skip(REASON)
    world = World(2, tmp_path_factory.mktemp("pair"))
    yield world
    world.close()

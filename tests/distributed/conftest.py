"""Worlds of 1, 2 and 4 processes, shared by all tests here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.world import REASON, World


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, World]]:
    if REASON:
        pytest.skip(REASON)
    folder = tmp_path_factory.mktemp("worlds")
    made = {size: World(size, folder) for size in (1, 2, 4)}
    yield made
    for world in made.values():
        world.close()

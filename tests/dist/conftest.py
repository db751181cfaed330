"""One pool of workers per world size, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.dist.pool import Pool


@pytest.fixture(scope="module")
def pool(built_extension: None) -> Iterator[Callable[..., Pool]]:
    pools: dict[tuple[int, int | None], Pool] = {}

    def get(world: int, local_world: int | None = None) -> Pool:
        key = (world, local_world)
        if key not in pools or not pools[key].usable:
            pools[key] = Pool(world, local_world)
        return pools[key]

    yield get
    for started in pools.values():
        started.close()

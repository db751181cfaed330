"""DeepSpeed's CPU op is built before ranks start that would wait for it; what needs no launcher is forked from one warm process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.warm import Warm


@pytest.fixture(scope="session", autouse=True)
def built(built_extension: None) -> None:
    return None


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory, built: None) -> Iterator[Warm]:
    folder = tmp_path_factory.mktemp("warm")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    started = Warm(folder, environment=offline)
    yield started
    started.close()

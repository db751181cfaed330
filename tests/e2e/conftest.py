"""DeepSpeed's CPU op is built before the launcher starts ranks that would wait for it."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def built(built_extension: None) -> None:
    return None

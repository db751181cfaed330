"""What every unit test runs under: the same hypothesis examples on every machine, and NaN in what `torch.empty` returns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# What is red for one is red for all, and a run does not depend on the one before.
settings.register_profile("ds_cp", derandomize=True, deadline=None, database=None, print_blob=False)
settings.load_profile("ds_cp")


@pytest.fixture(scope="module", autouse=True)
def nan_filled_empty() -> Iterator[None]:
    """PyTorch fills uninitialised memory only while deterministic algorithms are on."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]

"""GPU tests run where there is a CUDA device, and are skipped where there is none.

With pytest-xdist (`-n 8 --dist loadgroup`) variants of a test with one kernel and head size share a worker and what it compiles.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    workers = config.pluginmanager.hasplugin("xdist")
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
            if workers:
                item.add_marker(pytest.mark.xdist_group(_compiled(item)))


def _compiled(item: pytest.Item) -> str:
    if item.path.name == "test_nccl.py" or item.originalname == "test_real_ranks_of_two_gpus":
        return "nccl"  # one pair of ranks
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return " ".join(str(x) for x in (item.originalname, *(given.get(key) for key in ("name", "size", "softcap"))))


@pytest.fixture(autouse=True)
def _memory_goes_back() -> Iterator[None]:
    """Workers share a GPU: what a test leaves in PyTorch's cache is lost to the others."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()

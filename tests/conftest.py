"""The build folder of torch extensions is inside the work tree, and their build happens once, before any test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_cp import preflight

ROOT = Path(__file__).parent.parent
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if sys.prefix != sys.base_prefix:  # DeepSpeed's op is built again whenever PATH leads to another ninja: always the venv's
    os.environ["PATH"] = f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}"

WAITING = ("hosts", "faults", "e2e")
"""Folders of tests that wait for processes more than they compute: they begin first, so that others always run beside them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folders = {name: i for i, name in enumerate(WAITING)}
    items.sort(key=lambda item: folders.get(item.path.relative_to(ROOT / "tests").parts[0], len(folders)))


@pytest.fixture(scope="session")
def built_extension() -> None:
    """DeepSpeed builds its CPU op at the first init_distributed; several ranks would each wait for one lock."""
    if os.environ["DS_ACCELERATOR"] == "cpu":
        preflight.check_extension_locks()  # a lock that a killed build left is said, not waited for
        code = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load(verbose=False)"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=600, cwd=ROOT, stdout=subprocess.DEVNULL)

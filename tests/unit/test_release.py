"""What a wheel and an sdist of this tree hold, built by setuptools without the network."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest

import ds_cp

ROOT = Path(__file__).parents[2]
SOURCES = tuple(path.name for path in ROOT.iterdir() if path.suffix in (".md", ".toml", ".py", ".txt", ".in", ".cff"))
FOLDERS = ("ds_cp", "ds_configs", "scripts", "docs", "tests")
BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist'); build_meta.build_sdist('dist')"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dist folder of a copy of this tree: a build leaves files beside the sources."""
    copy = tmp_path_factory.mktemp("release")
    for name in (*SOURCES, "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> list[str]:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def metadata(built: Path) -> Message:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


def test_the_wheel_has_the_whole_package_and_nothing_else(wheel: list[str]) -> None:
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "ds_cp").rglob("*.py")} | {"ds_cp/py.typed"}
    assert {"ds_cp/kernels/attention/flash_attn.py", "ds_cp/models/attach.py", "ds_cp/planner/search.py"} <= wanted
    assert {name for name in wheel if ".dist-info/" not in name} == wanted


def test_the_wheel_has_the_licence_and_the_command(wheel: list[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel)


def test_the_sdist_has_what_the_commands_of_the_readme_name(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "scripts/quickstart",
        "scripts/train.py",
        "ds_configs/hybrid.json",
        "requirements.txt",
        "LICENSE",
        "docs/config.md",
    } <= names
    assert not any("__pycache__" in name for name in names)


def test_the_metadata_says_what_the_package_says(metadata: Message) -> None:
    assert metadata["Version"] == ds_cp.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"version: {ds_cp.__version__}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"## [{ds_cp.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_exact_versions_are_within_the_ranges_of_the_package(metadata: Message) -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    pins["torch"] = re.search(r"torch==([\d.]+)", (ROOT / "scripts" / "quickstart").read_text(encoding="utf-8")).group(1)
    for text in metadata.get_all("Requires-Dist"):
        asked = Requirement(text)
        if asked.marker is None or asked.marker.evaluate({"extra": "dev"}):
            assert asked.specifier.contains(pins[asked.name], prereleases=True), f"{asked}: {pins[asked.name]}"


def test_mypy_checks_every_module() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    assert settings["files"] == ["ds_cp"]
    assert [entry["module"] for entry in settings["overrides"] if entry.get("ignore_errors")] == []

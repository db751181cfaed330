"""Runs over several hosts, which `scripts/hosts` makes on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "scripts" / "hosts"
TIMEOUT_S = 240
BAR = 1e-5

WHY_NOT = subprocess.run([TOOL, "check"], capture_output=True, text=True).stderr.strip()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

Hosts = Callable[..., str]


@pytest.fixture(scope="module")
def hosts(request: pytest.FixtureRequest, built_extension: None) -> Iterator[Hosts]:
    name = f"t{os.getpid()}"
    count, slots = request.param

    def tool(*arguments: str | Path) -> str:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        command = [TOOL, "--name", name, *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    tool.count, tool.slots = count, slots
    tool("up", "--hosts", str(count), "--slots", str(slots))
    yield tool
    tool("down")


MPI = ["mpirun", "-n", "4", "-hostfile", "{hostfile}", "--mca", "btl_tcp_if_include", "eth0"]
FORWARDED = ("PATH", "PYTHONPATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "GLOO_SOCKET_IFNAME")
LAUNCHERS = {
    "pdsh": ["deepspeed", "--hostfile", "{hostfile}", "--module"],
    "openmpi": ["deepspeed", "--hostfile", "{hostfile}", "--launcher", "openmpi", "--module"],
    "mpirun": [*MPI, *(word for name in FORWARDED for word in ("-x", name)), sys.executable, "-m"],
}


def run_parity(hosts: Hosts, launcher: str, out: Path) -> dict:
    hosts("run", *LAUNCHERS[launcher], "tests.hosts.parity_job", out)
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("hosts", "launcher"),
    [((2, 2), "pdsh"), ((2, 2), "openmpi"), ((2, 2), "mpirun"), ((4, 1), "openmpi")],
    ids=lambda value: value if isinstance(value, str) else "{} hosts x {}".format(*value),
    indirect=["hosts"],
)
def test_every_launcher_gives_the_gradients_of_one_process(hosts: Hosts, tmp_path: Path, launcher: str) -> None:
    found = run_parity(hosts, launcher, tmp_path / "out.json")
    assert found["ranks"] == 4
    for name, (loss_error, error, parameter) in found["errors"].items():
        assert loss_error < BAR, name
        assert error < BAR, (name, parameter)
    (ulysses, ring, data), neighbours = found["auto"]
    assert neighbours == hosts.slots
    assert (ulysses, ring, data) == (hosts.slots, hosts.count, 1)  # the all-to-all stays inside a host

"""Runs over several hosts, which `scripts/hosts` makes on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ds_cp import selftest
from tests.faults.job import STEPS
from tests.faults.test_faults import BOUND_S
from tests.hosts import parity_job, traffic_job
from tests.warm import Warm

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "scripts" / "hosts"
TIMEOUT_S = 600
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

    tool.count, tool.slots, tool.name = count, slots, name
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
    # Launchers differ in how ranks learn who and where they are: all cases with one, and the one with both axes with the others.
    cases = parity_job.CASES if launcher == "pdsh" else ["hybrid"]
    hosts("run", *LAUNCHERS[launcher], "tests.hosts.parity_job", out, *cases)
    found = json.loads(out.read_text())
    assert list(found["errors"]) == list(cases)
    return found


@pytest.mark.parametrize(
    ("hosts", "launcher"),
    [((2, 2), "pdsh"), ((2, 2), "mpirun"), ((4, 1), "openmpi")],
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


class Job:
    """One rank on each of two hosts, started by hand, so that no launcher ends the survivors."""

    def __init__(self, warm: list[Warm], folder: Path, module: str, *arguments: str | Path) -> None:
        self._logs = [folder / f"rank{rank}.log" for rank in range(len(warm))]
        shared = {"WORLD_SIZE": str(len(warm)), "MASTER_ADDR": "host1", "MASTER_PORT": "29511", "LOCAL_RANK": "0"}
        self.ranks = [
            server.start(module, *arguments, log=log, environment={**shared, "RANK": str(rank)})
            for rank, (server, log) in enumerate(zip(warm, self._logs, strict=True))
        ]

    def says(self, rank: int) -> str:
        return self._logs[rank].read_text(errors="replace")  # what is being written may end within a character

    def losses(self) -> dict[str, str]:
        return dict(re.findall(r"^loss (\d+) ([\d.]+)$", self.says(0), re.MULTILINE))

    def wait_for(self, text: str, rank: int = 0) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not re.search(text, self.says(rank)):
            assert time.monotonic() < deadline, self.says(rank)[-4000:]
            time.sleep(0.05)

    def codes(self) -> list[int]:
        return [rank.wait(TIMEOUT_S) for rank in self.ranks]


@pytest.fixture(scope="module")
def warm(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Warm]]:
    """One server on each host."""
    on = [[TOOL, "--name", hosts.name, "run", "--on", f"host{i + 1}"] for i in range(hosts.count)]
    servers = [Warm(tmp_path_factory.mktemp("warm"), prefix) for prefix in on]
    yield servers
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def whole(warm: list[Warm], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The losses of a run in which nothing goes wrong, as printed."""
    folder = tmp_path_factory.mktemp("whole")
    job = Job(warm, folder, "tests.faults.job", folder / "run", "calm")
    assert job.codes() == [0, 0], job.says(0)[-4000:]
    assert len(job.losses()) == STEPS
    return job.losses()


two_hosts = pytest.mark.parametrize("hosts", [(2, 1)], ids=["2 hosts x 1"], indirect=True)


@two_hosts
def test_a_host_that_is_cut_off_is_named_on_both_sides_and_the_last_checkpoint_goes_on(
    hosts: Hosts, warm: list[Warm], whole: dict[str, str], tmp_path: Path
) -> None:
    job = Job(warm, tmp_path, "tests.faults.job", tmp_path / "run", "slow")
    job.wait_for("loss 3")
    hosts("cut", "host2")
    assert len(job.losses()) < STEPS, "it was done before the cut"
    start = time.monotonic()
    try:
        for rank in (0, 1):
            job.wait_for(rf"ds_cp: rank {rank} on host{rank + 1} (stopped|waited) in step [4-8], \w", rank)
            print(f"rank {rank} said so {time.monotonic() - start:.1f} s after the cut")
        assert time.monotonic() - start < BOUND_S
        assert all(job.codes())
        print(f"both had ended {time.monotonic() - start:.1f} s after it")
    finally:
        hosts("mend", "host2")
    assert "rank 1 on host2" in job.says(0)
    assert "rank 0 on host1" in job.says(1)
    assert time.monotonic() - start < 2 * BOUND_S
    after = int((tmp_path / "run" / "latest").read_text().removeprefix("global_step"))
    resumed = Job(warm, tmp_path, "tests.faults.job", tmp_path / "run", "calm")
    assert resumed.codes() == [0, 0], resumed.says(0)[-4000:]
    assert [int(step) for step in resumed.losses()] == list(range(after + 1, STEPS + 1))
    assert resumed.losses().items() <= whole.items()


@two_hosts
def test_a_host_that_is_cut_off_for_five_seconds_goes_on(
    hosts: Hosts, warm: list[Warm], whole: dict[str, str], tmp_path: Path
) -> None:
    job = Job(warm, tmp_path, "tests.faults.job", tmp_path / "run", "patient")
    job.wait_for("loss 3")
    hosts("cut", "host2")
    time.sleep(5)
    assert len(job.losses()) < STEPS, "it was done before the cut"
    hosts("mend", "host2")
    assert job.codes() == [0, 0], job.says(0)[-4000:]
    assert job.losses() == whole


@two_hosts
def test_the_selftest_passes_over_a_hostfile(hosts: Hosts, tmp_path: Path) -> None:
    selftest.tiny_model("qwen3").config.save_pretrained(tmp_path)
    launch = LAUNCHERS["pdsh"]
    said = hosts("run", *launch, "ds_cp.cli", "selftest", "ds_configs/auto.json", "--model", tmp_path)
    assert re.search(r"host1: hop of the ring, slowest rank: [\d.]+ GB/s$", said, re.MULTILINE)
    assert re.search(r"^host1: PASS$", said, re.MULTILINE)


@two_hosts
def test_a_link_is_shaped_and_its_bytes_are_counted(hosts: Hosts) -> None:
    def queue() -> str:
        return hosts("run", "--on", "host2", "tc", "qdisc", "show", "dev", "eth0")

    hosts("shape", "--rate", "1gbit")
    assert "rate 1Gbit" in queue()
    hosts("shape", "--rate", "none")
    assert "rate" not in queue()
    assert {host: sent > 0 for host, sent in json.loads(hosts("sent")).items()} == {"host1": True, "host2": True}


@two_hosts
def test_the_interface_carries_what_the_formula_says(warm: list[Warm], tmp_path: Path) -> None:
    """Keys and values in forward and, unless kept, in backward; their gradients; what does not grow with the row is left out."""
    out = tmp_path / "out.json"
    job = Job(warm, tmp_path, "tests.hosts.traffic_job", out)
    assert job.codes() == [0, 0], job.says(0)[-4000:]
    for kept in traffic_job.KEPT:
        short, long = (json.loads(out.read_text())[kept][str(tokens)] for tokens in traffic_job.LENGTHS)
        fewer, more = (traffic_job.attention_bytes(tokens, kept) for tokens in traffic_job.LENGTHS)
        print(f"kept {kept}: {short} and {long} bytes a step, {(long - short) / (more - fewer):.4f} of the formula between them")
        assert 0.999 <= (long - short) / (more - fewer) <= 1.03, "headers of packets, acknowledgements, and the watch's beats"

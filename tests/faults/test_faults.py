"""What goes wrong on one rank ends the others within a bounded time, with a line that names who, where and when.

The last checkpoint goes on as if nothing had happened. The rows of docs/reliability.md.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.job import STEPS
from tests.ports import free_port
from tests.warm import Started, Warm

BOUND_S = 90
"""For a run to end after a fault: its timeouts are 10 s, and other tests may run beside it."""


@dataclass
class Ended:
    codes: list[int | None]
    texts: list[str]
    seconds: float

    def losses(self) -> dict[int, float]:
        return {int(step): float(loss) for step, loss in re.findall(r"^loss (\d+) ([\d.]+)$", self.texts[0], re.MULTILINE)}


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, built_extension: None) -> Iterator[Warm]:
    started = Warm(tmp_path_factory.mktemp("warm"))
    yield started
    started.close()


def run(warm: Warm, folder: Path, what: str, ranks: int = 2) -> Ended:
    """Starts the ranks by themselves, so that no launcher ends the survivors."""
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    files = [folder.parent / f"{folder.name}-{what}-{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(files):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(warm.start("tests.faults.job", folder, what, log=log, environment=environment))
    try:
        seconds = survivors_end(processes[:1] if what == "stop" else processes, files)  # what is stopped does not end
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait(30)
    return Ended([process.returncode for process in processes], [file.read_text() for file in files], seconds)


def survivors_end(processes: list[Started], files: list[Path]) -> float:
    """Seconds from the last loss that was printed until rank 0 has ended."""
    start, last, seen = time.monotonic(), time.monotonic(), ""
    while processes[0].poll() is None:
        text = files[0].read_text(errors="replace")  # what is being written may end within a character
        if text.count("loss ") != seen.count("loss "):
            last = time.monotonic()
        seen = text
        if (time.monotonic() - last > BOUND_S and "loss " in text) or time.monotonic() - start > 4 * BOUND_S:
            raise AssertionError(f"rank 0 did not end: {text[-3000:]}")
        time.sleep(0.2)
    for process in processes[1:]:
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            continue
    return time.monotonic() - last


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, warm: Warm) -> dict[int, float]:
    """The losses of a run in which nothing goes wrong."""
    ended = run(warm, tmp_path_factory.mktemp("whole") / "run", "nothing")
    assert ended.codes == [0, 0], ended.texts[0][-3000:]
    losses = ended.losses()
    assert sorted(losses) == list(range(1, STEPS + 1))
    return losses


def goes_on(warm: Warm, folder: Path, whole: dict[int, float], after: int) -> None:
    ended = run(warm, folder, "nothing")
    assert ended.codes == [0, 0], ended.texts[0][-3000:]
    losses = ended.losses()
    assert min(losses) == after + 1
    assert losses == {step: loss for step, loss in whole.items() if step > after}


LINES = {
    "kill-forward": r"ds_cp: rank 0 on \S+ stopped in step 4, \S.*(hop|Connection|closed)",
    "kill-backward": r"ds_cp: rank 0 on \S+ stopped in step 4, \S.*(hop|Connection|closed)",
    "kill-save": r"ds_cp: rank 0 on \S+ stopped in step 4, save: ",
    "stall": r"ds_cp: rank 0 on \S+ stopped in step 4, \S.*",
    "stop": r"ds_cp: rank 0 on \S+ (stopped|waited) in step 4, forward.*",
    "nan": r"ds_cp: rank 0 on \S+ stopped in step \d, \S.* is nan, from the tokens of ranks \[1\]",
    "full-disk": r"ds_cp: rank 0 on \S+ stopped in step 4, save: ",
}
"""The line of rank 0, where rank 1 has the fault in the fourth step."""
LEFT = 2
"""Steps in the checkpoint that is left then."""


@pytest.mark.parametrize("what", LINES)
def test_a_fault_ends_the_run_with_a_line_and_the_last_checkpoint_goes_on(
    what: str, warm: Warm, whole: dict[int, float], tmp_path: Path
) -> None:
    line = LINES[what]
    ended = run(warm, tmp_path / "run", what)
    assert ended.codes[0] not in (0, None), ended.texts[0][-3000:]
    assert re.search(line, ended.texts[0]), ended.texts[0][-3000:]
    assert ended.seconds < BOUND_S
    assert (tmp_path / "run" / "latest").read_text() == f"global_step{LEFT}"
    if what in ("kill-backward", "kill-save"):  # what is left is the same for the rest, and a run costs many seconds
        goes_on(warm, tmp_path / "run", whole, LEFT)


def test_sigterm_on_one_rank_saves_and_ends_all_of_them_with_success(warm: Warm, whole: dict[int, float], tmp_path: Path) -> None:
    ended = run(warm, tmp_path / "run", "term")
    assert ended.codes == [0, 0], ended.texts[0][-3000:]
    stopped = max(ended.losses())
    assert 4 <= stopped <= 5
    goes_on(warm, tmp_path / "run", whole, stopped)

"""Named ranges, waits, and the window of a profile, in one process."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest
import torch

from ds_cp import config, profiling, timing
from ds_cp.timing import ATTENTION, RING, Waits, named, timed


def names_in(path: Path) -> set[str]:
    with gzip.open(path, "rt") as file:
        return {event.get("name", "") for event in json.load(file)["traceEvents"]}


def test_a_range_is_in_the_trace_of_any_profiler_and_nothing_without_one() -> None:
    assert named("ds_cp here") is timing.NOTHING
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        for x in timing.each([1.0, 2.0], "ds_cp each"):
            torch.full((2,), x)
        with timed("ds_cp there", None, RING):
            torch.zeros(2)
    counts = {event.name: sum(other.name == event.name for other in trace.events()) for event in trace.events()}
    assert (counts["ds_cp each"], counts["ds_cp there"]) == (2, 1)
    assert named("ds_cp here") is timing.NOTHING


def test_a_range_is_nothing_to_a_compiler() -> None:
    waits = Waits()
    waits.counting = True

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: torch.Tensor) -> torch.Tensor:
        with named("ds_cp here"), timed("ds_cp there", waits, RING):
            return x + 1

    assert compiled(torch.ones(1)).item() == 2
    assert waits.take() == dict.fromkeys(timing.KINDS, 0.0)


def test_waits_count_by_kind_and_only_while_counting() -> None:
    waits = Waits()
    with timed("before", waits, RING):
        time.sleep(0.001)
    assert waits.take() == dict.fromkeys(timing.KINDS, 0.0)
    waits.counting = True
    with timed("outside", waits, ATTENTION), timed("inside", waits, RING):
        time.sleep(0.001)
    found = waits.take()
    assert 0.001 <= found[RING] <= found[ATTENTION]
    assert waits.take() == dict.fromkeys(timing.KINDS, 0.0)


def steps(profile: profiling.Profile, numbers: range) -> None:
    """Optimizer steps of two micro-batches and an evaluation; the work of each has its own name."""
    for step in numbers:
        for done, training in ((step, True), (step, True), (step + 1, False)):
            profile.forward(done, training)
            with named(f"work after {done}"):
                torch.zeros(2)


@pytest.mark.parametrize("first", [0, 700])
def test_a_profile_holds_the_steps_of_its_window(tmp_path: Path, first: int) -> None:
    profile = profiling.Profile(config.Profile(after=2, steps=2, folder=str(tmp_path / "new")), 3, 8, cuda=False)
    steps(profile, range(first, first + 5))
    assert profile.written == tmp_path / "new" / "rank3of8_steps3-4.json.gz"
    found = {name for name in names_in(profile.written) if name.startswith("work")}
    assert found == {f"work after {first + n}" for n in (2, 3)}
    assert not torch.autograd.profiler._is_profiler_enabled, "it has stopped"


def test_a_run_that_ends_inside_the_window_writes_what_there_is(tmp_path: Path) -> None:
    profile = profiling.Profile(config.Profile(after=1, steps=9, folder=str(tmp_path)), 0, 1, cuda=False)
    steps(profile, range(3))
    profile.end()
    assert [path.name for path in tmp_path.iterdir()] == ["rank0of1_steps2-3.json.gz"]
    assert {"work after 1", "work after 2", "work after 3"} <= names_in(next(tmp_path.iterdir()))
    profile.end()


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_run_that_ends_before_the_window_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], done: int) -> None:
    profile = profiling.Profile(config.Profile(after=2, folder=str(tmp_path)), 0, 1, cuda=False)
    steps(profile, range(done))
    profile.end()
    assert list(tmp_path.iterdir()) == []
    assert f"the run ended in its step {done}, and steps 3 to 4 were to be recorded" in capsys.readouterr().err

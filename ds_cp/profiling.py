"""`profile`: a trace of a few optimizer steps of every rank, for ui.perfetto.dev or chrome://tracing.

    steps of this run    1 ... after - 1    after       after + 1 ... after + steps
                         untouched          profiler    recorded: one file a rank
                                            warms up

Steps count from the first of this process, also where a run goes on from a checkpoint. A run that ends inside the window writes
what it has when the process ends; one that ends before it says so.
"""

from __future__ import annotations

import atexit
import sys
import weakref
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, schedule


class Window(Protocol):
    """`config.Profile`."""

    after: int
    steps: int
    folder: str


class Profile:
    """One rank's."""

    def __init__(self, window: Window, rank: int, world: int, cuda: bool) -> None:
        self._window, self._rank, self._world = window, rank, world
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        self._trace: Any = None
        self._first: int | None = None
        self._seen = -1
        self.written: Path | None = None
        atexit.register(_end, weakref.ref(self))

    def forward(self, step: int, training: bool) -> None:
        """A forward pass after `step` finished optimizer steps."""
        if self.written is not None:
            return
        if self._first is None:
            if not training:
                return
            self._first = self._seen = step
        begun = step - self._first  # steps before this one
        if not training and begun < self._window.after + self._window.steps:
            return  # of no step of its own; behind the last one it ends the window
        if self._trace is None and begun == self._window.after - 1:
            warm_up_first = schedule(wait=0, warmup=1, active=self._window.steps, repeat=1)
            self._trace = profile(activities=self._activities, schedule=warm_up_first, on_trace_ready=self._write)
            self._trace.start()
        elif self._trace is not None:
            for _ in range(step - self._seen):
                self._trace.step()
        self._seen = step
        if self.written is not None:
            self._trace.stop()
            self._trace = None

    def _write(self, trace: Any) -> None:
        folder = Path(self._window.folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        first, last = self._window.after + 1, self._window.after + self._window.steps
        reached = self._seen - (self._first or 0) + 1
        path = folder / f"rank{self._rank}of{self._world}_steps{first}-{min(last, reached)}.json.gz"
        self.written = path
        trace.export_chrome_trace(str(path))
        if self._rank == 0:
            print(f"ds_cp: profile: each rank writes a trace like {path.resolve()}; open it in ui.perfetto.dev", flush=True)

    def end(self) -> None:
        """The process ends."""
        if self.written is not None:
            return
        if self._trace is not None:
            self._trace.stop()  # which writes what was recorded
            self._trace = None
        if self.written is None and self._rank == 0:
            done = 0 if self._first is None else self._seen - self._first + 1
            print(
                f"ds_cp: profile: nothing was written: the run ended in its step {done}, and steps {self._window.after + 1} to "
                f"{self._window.after + self._window.steps} were to be recorded; set a smaller sequence_parallel.profile.after",
                file=sys.stderr,
                flush=True,
            )


def describe(window: Window | None) -> str:
    if window is None:
        return "off"
    return f"steps {window.after + 1} to {window.after + window.steps} of this process, in {window.folder}/"


def begin(window: Window | None) -> Profile | None:
    """The profile of this rank; None where none is asked for."""
    if window is None:
        return None
    return Profile(window, dist.get_rank(), dist.get_world_size(), "nccl" in dist.get_backend())


def _end(here: weakref.ref[Profile]) -> None:
    found = here()
    if found is not None:
        found.end()

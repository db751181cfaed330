"""Named ranges for a profiler, and the time that a rank's compute waits for other ranks.

    named("ds_cp ...")              a range in whatever torch.profiler is running; where none is, nothing
    timed("ds_cp ...", waits, ...)  the same, and its time is added up by kind while `Waits.counting`

Time is the host's on CPU, where a wait holds up the host. On CUDA it is the compute streams': an event before and one after, read
once both have passed, so that the host waits for neither. Where two streams take turns (`ds_cp.lanes`), a wait counts from when
the last of them ran dry: a hop that one of them waits for behind the other's kernels is hidden.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch.autograd import profiler

RING = "ring"
"""Waits for hops of the ring, its gathers and reduce-scatters, and the keys of windows."""
EXCHANGE = "exchange"
"""All-to-alls, tokens before a convolution's, states that are passed on, images' features: what is not behind any computation."""
ATTENTION = "attention"
"""Attention of a ring rank, forward and backward; RING is part of it."""
KINDS = (RING, EXCHANGE, ATTENTION)

Item = TypeVar("Item")

NOTHING: AbstractContextManager[None] = nullcontext()


def named(name: str) -> AbstractContextManager[object]:
    """A range of this name in the trace of the profiler that is running, ours or the user's."""
    if not profiler._is_profiler_enabled or torch.compiler.is_compiling():
        return NOTHING
    return profiler.record_function(name)


def each(items: Iterable[Item], name: str) -> Iterator[Item]:
    """The items, what is done with each in a range of its own."""
    for item in items:
        with named(name):
            yield item


class Waits:
    """Seconds of one rank by kind, while `counting`."""

    def __init__(self, cuda: bool = False) -> None:
        self.counting = False
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self.cuda = cuda
        self._pending: deque[tuple[str, list[torch.cuda.Event], torch.cuda.Event]] = deque()
        self._free: list[torch.cuda.Event] = []

    def take(self) -> dict[str, float]:
        """What was counted since the last call; on CUDA of what the device has done."""
        self.settle()
        found, self.seconds = self.seconds, dict.fromkeys(KINDS, 0.0)
        return found

    def settle(self) -> None:
        """Reads the events that have passed, the oldest first, and frees them."""
        # Also those of other streams, which may still be busy when what was waited for is long there.
        while self._pending and all(event.query() for event in (*self._pending[0][1], self._pending[0][2])):
            kind, begun, done = self._pending.popleft()
            self.seconds[kind] += max(min(event.elapsed_time(done) for event in begun), 0.0) / 1e3
            self._free += [*begun, done]

    def add(self, kind: str, begun: list[torch.cuda.Event]) -> None:
        """From the last of `begun` to what the current stream was given until now."""
        self._pending.append((kind, begun, self.event()))

    def event(self, stream: torch.cuda.Stream | None = None) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(stream or torch.cuda.current_stream())
        return event


def timed(name: str, waits: Waits | None, kind: str, streams: Sequence[torch.cuda.Stream] = ()) -> AbstractContextManager[object]:
    """A named range whose time counts as `kind`.

    Args:
        streams: others that compute for this rank, beside the current one; the time counts while all of them are idle.
    """
    if waits is None or not waits.counting or torch.compiler.is_compiling():
        return named(name)
    return _OfDevice(name, waits, kind, streams) if waits.cuda else _OfHost(name, waits, kind)


class _OfHost:
    def __init__(self, name: str, waits: Waits, kind: str) -> None:
        self._range, self._waits, self._kind = named(name), waits, kind

    def __enter__(self) -> None:
        self._range.__enter__()
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._waits.seconds[self._kind] += time.perf_counter() - self._start
        self._range.__exit__(None, None, None)


class _OfDevice:
    def __init__(self, name: str, waits: Waits, kind: str, streams: Sequence[torch.cuda.Stream]) -> None:
        self._range, self._waits, self._kind, self._streams = named(name), waits, kind, streams

    def __enter__(self) -> None:
        self._range.__enter__()
        self._begun = [self._waits.event(), *(self._waits.event(stream) for stream in self._streams)]

    def __exit__(self, *error: object) -> None:
        self._waits.add(self._kind, self._begun)
        self._range.__exit__(None, None, None)

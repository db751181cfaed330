"""What stands for `ds_cp.comm` where no network is: a ring in one process.

Wire      one rank alone, for time: what it would receive is a copy of what it sends, made on a stream of its own as by NCCL.
Lockstep  every rank a thread, for numbers: a tensor goes through a queue to the rank that gets it. One rank runs at a time and
          hands over where it waits, so nothing else in the process needs to be safe against threads.

Either is given to the code as its process group. `install` puts `Hop`, `Gather` and `reduce_scatter` of this module into
ds_cp.comm; they have the signatures of those they stand for.
"""

from __future__ import annotations

import queue
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ds_cp import comm

POLL_SECONDS = 0.2
Result = TypeVar("Result")
Wait = Callable[[], Tensor]
Sends = Sequence[tuple[Tensor, int]]


class Group(Protocol):
    """A posted operation is returned as the function that waits for it."""

    beside: torch.cuda.Stream | None

    def hop(self, sent: Sends, received: Sends, what: str) -> list[Wait]: ...
    def gather(self, x: Tensor, received: Tensor) -> Wait: ...
    def reduce_scatter(self, x: Tensor) -> Tensor: ...


class Hop:
    def __init__(self, sent: Sends, received: Sends, axis: Any, what: str) -> None:
        assert all(x.is_contiguous() for x, _ in (*sent, *received))
        self._sent = sent  # kept alive until the copies are done
        self._waits: list[Wait] = axis.group.hop(sent, received, what)

    def wait(self, streams: Sequence[torch.cuda.Stream] = ()) -> None:
        for wait in self._waits:
            wait()


class Gather:
    def __init__(self, sent: Sequence[Tensor], received: Sequence[Tensor], axis: Any) -> None:
        assert all(x.is_contiguous() for x in (*sent, *received))
        self._sent = sent
        self._waits: list[Wait] = [axis.group.gather(x, into) for x, into in zip(sent, received, strict=True)]

    def wait(self) -> None:
        for wait in self._waits:
            wait()


def reduce_scatter(parts: Sequence[Tensor], axis: Any) -> list[Tensor]:
    assert all(x.is_contiguous() for x in parts)
    return [axis.group.reduce_scatter(x) for x in parts]


def install() -> None:
    """For the rest of this process."""
    for stand_in in (Hop, Gather, reduce_scatter):
        setattr(comm, stand_in.__name__, stand_in)


class Wire:
    """A `Group` of one rank that hears its own voice."""

    def __init__(self, device: str) -> None:
        self._stream, self.beside = (torch.cuda.Stream(), torch.cuda.Stream()) if device == "cuda" else (None, None)

    def hop(self, sent: Sends, received: Sends, what: str) -> list[Wait]:
        """What comes in is a copy of what goes out; where nothing does, of itself."""
        return [self._copied(into, next((x for x, _ in sent if x.shape == into.shape), into)) for into, _ in received]

    def gather(self, x: Tensor, received: Tensor) -> Wait:
        return self._copied(received, x.unsqueeze(0))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return x.sum(0)

    def _copied(self, into: Tensor, x: Tensor) -> Wait:
        if self._stream is None:
            into.copy_(x)
            return lambda: into
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            into.copy_(x)
            done = self._stream.record_event()

        def wait() -> Tensor:
            torch.cuda.current_stream().wait_event(done)  # the stream waits, not the host
            return into

        return wait


class Parcel:
    """A copy of a tensor, for another thread, whose current stream may be another."""

    def __init__(self, x: Tensor) -> None:
        self._x = x.clone()
        self._ready = torch.cuda.current_stream().record_event() if x.is_cuda else None

    def opened(self) -> Tensor:
        if self._ready is not None:
            torch.cuda.current_stream().wait_event(self._ready)
            self._x.record_stream(torch.cuda.current_stream())
        return self._x


class Lockstep:
    """The ranks of one ring. The queues are by receiver, sender and purpose."""

    def __init__(self, size: int) -> None:
        self.size, self.turn = size, Lock()
        self.queues: dict[tuple[int, int, str], queue.Queue[Parcel]] = defaultdict(queue.Queue)
        self.failure: BaseException | None = None

    def run(self, one: Callable[[int, Seat], Result]) -> list[Result]:
        """`one(rank, group)` of every rank."""

        def guarded(rank: int) -> Any:
            with self.turn:
                try:
                    return one(rank, Seat(self, rank))
                except BaseException as error:  # the first is the cause, the others' waiting its effect
                    self.failure = self.failure or error

        with ThreadPoolExecutor(self.size) as threads:
            results = list(threads.map(guarded, range(self.size)))
        if self.failure is not None:
            raise self.failure
        return results


class Seat:
    """A `Group` as one rank of a `Lockstep` sees it."""

    def __init__(self, ring: Lockstep, rank: int) -> None:
        self._ring, self._rank = ring, rank
        self.beside = torch.cuda.Stream() if torch.cuda.is_available() else None  # what a rank frees, another must not get

    def hop(self, sent: Sends, received: Sends, what: str) -> list[Wait]:
        for x, peer in sent:
            self._put(peer, what, x)
        return [lambda into=into, peer=peer: into.copy_(self._take(peer, what)) for into, peer in received]

    def gather(self, x: Tensor, received: Tensor) -> Wait:
        for receiver in range(len(received)):
            self._put(receiver, "gather", x)
        return lambda: received.copy_(torch.stack([self._take(sender, "gather") for sender in range(len(received))]))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        for receiver, part in enumerate(x):
            self._put(receiver, "scatter", part)
        return torch.stack([self._take(sender, "scatter") for sender in range(len(x))]).sum(0)

    def _put(self, receiver: int, what: str, x: Tensor) -> None:
        self._ring.queues[receiver, self._rank, what].put(Parcel(x))

    def _take(self, sender: int, what: str) -> Tensor:
        arriving = self._ring.queues[self._rank, sender, what]
        self._ring.turn.release()
        try:
            while self._ring.failure is None:
                try:
                    return arriving.get(timeout=POLL_SECONDS).opened()
                except queue.Empty:
                    continue
            raise RuntimeError("another rank failed")
        finally:
            self._ring.turn.acquire()

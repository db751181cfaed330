"""Two CUDA streams that take turns: where a kernel no longer fills the GPU, the next one's blocks begin beside it.

A kernel's blocks never fill whole waves, and between two kernels of one stream the GPU drains. Turns 0, 2, 4, ... are on the stream
that was current, turns 1, 3, 5, ... on the one beside it. What both touch needs `order`; tensors of either must live until `join`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class Lanes:
    def __init__(self, beside: torch.cuda.Stream | None) -> None:
        """
        Args:
            beside: waits from here on for what the current stream was given; None: all turns are on the current stream.
        """
        self._streams = None if beside is None else (torch.cuda.current_stream(), beside)
        self.order(0, 1)

    def turn(self, number: int) -> AbstractContextManager:
        """What is launched inside belongs to this turn. Not to be nested."""
        return nullcontext() if self._streams is None or number % 2 == 0 else _Current(*self._streams)

    def others(self, number: int) -> tuple[torch.cuda.Stream, ...]:
        """Streams that turns beside this one are on."""
        return () if self._streams is None else (self._streams[(number + 1) % 2],)

    def order(self, first: int, then: int) -> None:
        """What the turn `then` is given from here on comes after what `first` was given before."""
        if self._streams is not None and (first - then) % 2:
            self._streams[then % 2].wait_stream(self._streams[first % 2])

    def join(self) -> None:
        self.order(1, 0)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What is launched inside comes after every turn so far, and the turns to come after it."""
        self.order(1, 0)
        with self.turn(0):
            yield
        self.order(0, 1)


class _Current:
    """`torch.cuda.stream` without its questions: they would take as long as a launch."""

    def __init__(self, outside: torch.cuda.Stream, inside: torch.cuda.Stream) -> None:
        self._outside, self._inside = outside, inside

    def __enter__(self) -> None:
        torch.cuda.set_stream(self._inside)

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_stream(self._outside)

"""What gradient checkpointing keeps of a layer, its input, waits for backward in pinned host memory.

    forward of layer i     compute stream: layer i            side stream: input of i -> host
    backward of layer i    compute stream: layer i again      side stream: input of i - 1 <- host

Checkpointing saves a layer's input through autograd's saved tensors (reentrant or not), so the saved-tensors hooks of
`torch.autograd.graph` around the forward pass see it; what a checkpointed layer would save inside never reaches them. The side
stream keeps copies in order; the compute stream waits only for the input it needs next, and for the last copy but one before the
next is posted: AT_ONCE inputs at most are on the device because of copies, however far ahead the host is. All memory is the compute
stream's. On the CPU the copies are plain copies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

AT_ONCE = 2
PIECE_BYTES = 1 << 26
"""Of host memory, which PyTorch rounds up to a power of two: a tensor in such pieces wastes less than one of them."""


@dataclass(eq=False)
class Kept:
    """One tensor that was saved; `back` is its copy on the device once it has been asked for or is expected to be."""

    host: list[Tensor]
    shape: torch.Size
    device: torch.device
    back: Tensor | None = None
    arrived: torch.cuda.Event | None = None


class Offload:
    """Saved tensors of one shape and dtype are kept on the host, in the order in which they were saved."""

    def __init__(self) -> None:
        self._hooks: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._sent: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self.count = 0
        """Tensors that the last forward pass sent to the host."""

    def begin(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """Starts a forward pass whose layer inputs have this shape and dtype."""
        self.end()
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device)
        order: list[Kept] = []
        self.count = 0

        def pack(x: Tensor) -> Tensor | tuple[list[Kept], int]:
            if x.shape != shape or x.dtype != dtype or isinstance(x, torch.nn.Parameter):
                return x
            order.append(self._send(x))
            self.count += 1
            return order, len(order) - 1

        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, self._unpack)
        self._hooks.__enter__()

    def end(self) -> None:
        """After the forward pass, also one that failed."""
        if self._hooks is not None:
            self._hooks.__exit__(None, None, None)
            self._hooks = None
        self._release(0)

    def _unpack(self, kept: Tensor | tuple[list[Kept], int]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        order, index = kept
        self._fetch(order[index])
        x, arrived, order[index].back = order[index].back, order[index].arrived, None
        assert x is not None, "it was asked for twice"
        if arrived is not None:
            torch.cuda.current_stream(x.device).wait_event(arrived)
        if index:
            self._fetch(order[index - 1])
        return x

    def _send(self, x: Tensor) -> Kept:
        flat = x.detach().contiguous().view(-1)
        pieces = flat.split(PIECE_BYTES // x.element_size())
        kept = Kept([torch.empty_like(piece, device="cpu", pin_memory=x.is_cuda) for piece in pieces], x.shape, x.device)
        self._release(AT_ONCE - 1)
        done = self._copy(kept.host, pieces, x.device)
        if done is not None:
            self._sent.append((flat, done))
        return kept

    def _fetch(self, kept: Kept) -> None:
        if kept.back is None:
            kept.back = torch.empty(kept.shape, dtype=kept.host[0].dtype, device=kept.device)
            kept.arrived = self._copy(kept.back.view(-1).split(PIECE_BYTES // kept.back.element_size()), kept.host, kept.device)

    def _copy(self, into: Sequence[Tensor], pieces: Sequence[Tensor], device: torch.device) -> torch.cuda.Event | None:
        """On the side stream, after what the current stream was given; the event at its end, None where there is no stream."""
        if self._stream is None:
            for to, piece in zip(into, pieces, strict=True):
                to.copy_(piece)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for to, piece in zip(into, pieces, strict=True):
                to.copy_(piece, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return done

    def _release(self, left: int) -> None:
        """The device memory of all but the last `left` tensors that were sent may be used again by what comes next."""
        while len(self._sent) > left:
            x, done = self._sent.popleft()
            torch.cuda.current_stream(x.device).wait_event(done)

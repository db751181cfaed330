"""What gradient checkpointing keeps of a layer, its input, waits for backward in pinned host memory.

    forward of layer i     compute stream: layer i            side stream: input of i -> host
    backward of layer i    compute stream: layer i again      side stream: input of i - 1 <- host

Checkpointing saves a layer's input through autograd's saved tensors (reentrant or not), so the saved-tensors hooks of
`torch.autograd.graph` around the forward pass see it; what a checkpointed layer would save inside never reaches them. The side
stream keeps copies in order; the compute stream waits only for the input it needs next. On the CPU the copies are plain copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Kept:
    """One tensor that was saved; `back` is its copy on the device once it has been asked for or is expected to be."""

    host: Tensor
    device: torch.device
    back: Tensor | None = None
    arrived: torch.cuda.Event | None = None


class Offload:
    """Saved tensors of one shape and dtype are kept on the host, in the order in which they were saved."""

    def __init__(self) -> None:
        self._hooks: Any = None
        self._stream: torch.cuda.Stream | None = None
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

    def _unpack(self, kept: Tensor | tuple[list[Kept], int]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        order, index = kept
        x = self._fetch(order[index])
        if order[index].arrived is not None:
            current = torch.cuda.current_stream(x.device)
            current.wait_event(order[index].arrived)
            x.record_stream(current)
        order[index].back = None
        if index:
            order[index - 1].back = self._fetch(order[index - 1])
        return x

    def _send(self, x: Tensor) -> Kept:
        if self._stream is None:
            return Kept(x.detach().clone(), x.device)
        host = torch.empty_like(x, device="cpu", pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._stream):
            host.copy_(x.detach(), non_blocking=True)
        x.record_stream(self._stream)  # its memory is not given away before the copy is made
        return Kept(host, x.device)

    def _fetch(self, kept: Kept) -> Tensor:
        if kept.back is not None:
            return kept.back
        if self._stream is None:
            return kept.host
        with torch.cuda.stream(self._stream):
            back = kept.host.to(kept.device, non_blocking=True)
            kept.arrived = torch.cuda.Event()
            kept.arrived.record(self._stream)
        return back

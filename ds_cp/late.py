"""A flag that the device computes and the host reads later, without waiting for the work that the device was given meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor


class Late:
    """One such flag; on CPU it is there at once.

    Reading a CUDA tensor waits for all that its stream was given. This copies the flag to pinned memory where it stands in the
    stream, and reading waits for that copy alone.
    """

    def __init__(self, flag: Tensor) -> None:
        """`flag`: 0-d bool."""
        self._host, self._copied = flag, None
        if flag.is_cuda:
            self._host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(flag, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> bool:
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._host)

"""Computing something again in backward as it was computed in forward: the same random numbers, the same autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states


class Replay:
    """Notes the state at its making; `with replay():` runs under that state and leaves the caller's untouched."""

    def __init__(self, x: Tensor) -> None:
        device = x.device.type
        self._autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(x)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        device, dtype, enabled = self._autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled), torch.random.fork_rng(devices=self._devices):
            torch.set_rng_state(self._cpu)
            set_device_states(self._devices, self._states)
            yield

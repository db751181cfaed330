"""What the ranks of a job can do: bandwidth of each axis's exchange, and speed of the attention kernel, in seconds.

Sizes are those of a training step's smallest exchanges that still fill a link; a run of a few repeats, the fastest counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from ds_cp import comm
from ds_cp.kernels import choice
from ds_cp.kernels.attention import Kernel, Score
from ds_cp.mesh import AxisGroup, Mesh
from ds_cp.tiles import Tile

MESSAGE: Mapping[str, int] = {"cuda": 64 << 20, "cpu": 4 << 20}
"""Bytes that a rank sends."""
TOKENS: Mapping[str, int] = {"cuda": 8192, "cpu": 512}
REPEATS = 5


def bandwidths(mesh: Mesh, device: torch.device) -> dict[str, float]:
    """Bytes a second that this rank sends, by exchange; all ranks of the job must call it."""
    x = torch.zeros(MESSAGE[device.type], dtype=torch.uint8, device=device)
    found = {}
    for name, axis, exchange in (("all-to-all over ulysses", mesh.ulysses, _all_to_all), ("hop of the ring", mesh.ring, _hop)):
        if axis.size > 1:
            sent = len(x) if axis is mesh.ring else len(x) * (axis.size - 1) / axis.size
            found[name] = sent / fastest(partial(exchange, x, axis), device)
    return found


def _all_to_all(x: Tensor, axis: AxisGroup) -> None:
    comm.all_to_all(x[: len(x) // axis.size * axis.size].view(axis.size, -1), axis)


def _hop(x: Tensor, axis: AxisGroup) -> None:
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    received = torch.empty_like(x)
    assert axis.group is not None
    comm.Hop([(x, after)], [(received, before)], axis, "selftest").wait()


def kernel_speed(kernel: Kernel, heads: tuple[int, int], head_size: int, dtype: torch.dtype, device: torch.device) -> float | None:
    """Flops a second of a causal tile, forward and backward; None where the kernel does not take it.

    Args:
        heads: query and key/value heads of a rank.
    """
    tokens = TOKENS[device.type]
    q, k, v, dout = (
        torch.randn(tokens, n, head_size, device=device, dtype=dtype) for n in (heads[0], heads[1], heads[1], heads[0])
    )
    tile, score = Tile(0, tokens, 0, tokens, (0, tokens)), Score(head_size**-0.5, None)
    if kernel.unsupported(q, k, v, tile, score) is not None:
        return None

    def both() -> None:
        out, lse = kernel.forward(q, k, v, tile, score)
        kernel.backward(dout, q, k, v, out, lse, tile, score)

    return 3.5 * choice.flops(q, tile) / fastest(both, device)  # of backward 2.5 times the products of forward


def fastest(work: Callable[[], None], device: torch.device) -> float:
    """Seconds of the fastest of a few runs, after one that is not counted."""
    seconds = []
    for _ in range(1 + REPEATS):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

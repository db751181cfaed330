"""One rank of a ring, or one kernel, in one process: its inputs, its two directions, their time and memory.

A contender is a pair of functions: forward() gives what backward takes. They are called directly, without autograd.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from ring_peers import PEERS
from torch import Tensor

from ds_cp import balance, tiles
from ds_cp import layout as layouts
from ds_cp.kernels import choice
from ds_cp.kernels.attention import Kernel, Score
from ds_cp.ring import RingAttention
from ds_cp.tiles import Tile

MIB = 2**20
SETTLE_SECONDS = 6.0  # at most, for `auto` to have paid for its cuDNN plans

Row = dict[str, Any]
Forward = Callable[[], Any]
Backward = Callable[[Any], Any]


def inputs(args: argparse.Namespace, tokens: int, heads: tuple[int, int], size: int) -> list[Tensor]:
    """dout, q, k, v, standard normal."""
    generator = torch.Generator(device=args.device).manual_seed(tokens + size)
    counts = (heads[0], heads[0], heads[1], heads[1])
    return [torch.randn(tokens, n, size, device=args.device, dtype=args.dtype, generator=generator) for n in counts]


def now(device: str) -> Any:
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start: Any, end: Any) -> float:
    return (end - start) * 1000 if isinstance(start, float) else start.elapsed_time(end)


def synchronized(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(args: argparse.Namespace, forward: Forward, backward: Backward, kernel: Kernel) -> Row:
    """Median milliseconds and extra memory. The first call, which compiles, and one more warm up."""

    def once() -> float:
        start = synchronized(args.device)
        backward(forward())
        return synchronized(args.device) - start

    cuda = args.device == "cuda"
    first = seconds = once()
    if first < 10 * args.seconds:
        seconds = once()
    end = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < end and min(getattr(kernel, "saved_seconds", {}).values(), default=math.inf) < choice.PLAN_SECONDS:
        seconds = once()
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    marks = []
    for _ in range(min(max(int(args.seconds / seconds), 1), args.calls)):
        start = now(args.device)
        state = forward()
        middle = now(args.device)
        backward(state)
        del state
        marks.append((start, middle, now(args.device)))
    synchronized(args.device)
    samples = [[milliseconds(a, b), milliseconds(b, c)] for a, b, c in marks]
    row: Row = {"forward_ms": statistics.median(f for f, _ in samples), "backward_ms": statistics.median(b for _, b in samples)}
    row["total_ms"] = statistics.median(f + b for f, b in samples)
    row["extra_mib"] = (torch.cuda.max_memory_allocated() - before) / MIB if cuda else None
    return row | {"first_s": first, "samples_ms": samples}


def loop(args: argparse.Namespace, name: str, call: Callable[[], Any]) -> Row:
    """Microseconds a call, launches included where they are what it waits for: the median of three loops."""
    seconds = []
    for _ in range(2):
        start = synchronized(args.device)
        call()
        seconds.append(synchronized(args.device) - start)
    calls = min(max(int(args.tile_seconds / 3 / seconds[1]), 3), 100)
    samples = []
    for _ in range(3):
        start = now(args.device)
        for _ in range(calls):
            call()
        end = now(args.device)
        synchronized(args.device)
        samples.append(milliseconds(start, end) * 1000 / calls)
    return {f"{name}_us": statistics.median(samples), f"{name}_first_s": seconds[0], f"{name}_samples_us": samples}


class Saver:
    """What autograd gives a Function as ctx."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *saved: Tensor) -> None:
        self.saved_tensors = saved


def resolve(name: str, args: argparse.Namespace) -> Kernel:
    capability = torch.cuda.get_device_capability()[0] if args.device == "cuda" else None
    return choice.resolve(name, args.device, capability)


def causal(args: argparse.Namespace, documents: Sequence[int]) -> Tile:
    return on_device(args, Tile(0, documents[-1], 0, documents[-1], tuple(documents)))


def on_device(args: argparse.Namespace, own: Tile) -> Tile:
    """With its boundaries where kernels read them, as ds_cp.batch puts them there."""
    if args.device == "cpu":
        return own
    bounds = torch.tensor(own.documents, dtype=torch.int32, pin_memory=True)
    return replace(own, cu_seqlens=bounds.to("cuda", non_blocking=True))


def ring_context(
    args: argparse.Namespace, kernel: Kernel, documents: Sequence[int], axis: Any, impl: str, name: str = "zigzag"
) -> Any:
    """The part of a SequenceContext that the ring reads. Plans the tiles."""
    layout = layouts.build(name, documents[-1], axis.size, 1, documents)
    documents = balance.padded(documents, layout.length)
    plan = (tiles.plan_gathered if impl == "allgather" else tiles.plan)(layout, axis.rank, documents)
    (own,), *rest = plan.steps
    plan = replace(plan, steps=((on_device(args, own),), *rest))
    methods = SimpleNamespace(attention=kernel, beside=axis.group.beside if args.lanes else None)
    return SimpleNamespace(methods=methods, plans={None: plan}, layout=layout, mesh=SimpleNamespace(ring=axis))


def axis(group: Any, size: int, rank: int) -> Any:
    return SimpleNamespace(group=group, ranks=tuple(range(size)), rank=rank, size=size, waits=None)


def ours(context: Any, tensors: list[Tensor]) -> tuple[Forward, Backward]:
    dout, q, k, v = tensors

    def forward() -> Saver:
        ctx = Saver()
        RingAttention.forward(ctx, q, k, v, None, context, context.plans[None], Score(q.shape[-1] ** -0.5))
        return ctx

    return forward, lambda ctx: RingAttention.backward(ctx, dout)[:3]


def theirs(name: str, kernel: Kernel, axis: Any, tensors: list[Tensor]) -> tuple[Forward, Backward]:
    dout, q, k, v = tensors
    peer = PEERS[name](kernel, axis, len(q), q.device.type, Score(q.shape[-1] ** -0.5))
    return lambda: peer.forward(q, k, v), lambda saved: peer.backward(dout, saved)


def any_rank(
    args: argparse.Namespace, contender: str, kernel: Kernel, documents: Sequence[int], place: Any, tensors: list[Tensor]
) -> tuple[Forward, Backward]:
    if documents[-1] % (2 * place.size):
        raise ValueError(f"{documents[-1]} tokens do not divide into 2 x {place.size} chunks")
    if contender in PEERS:
        return theirs(contender, kernel, place, tensors)
    return ours(ring_context(args, kernel, documents, place, contender.split()[1]), tensors)


def alone(kernel: Kernel, tile: Tile, tensors: list[Tensor]) -> tuple[Forward, Backward]:
    """One kernel call on slices as long as the tile."""
    dout, q, k, v = tensors
    score = Score(q.shape[-1] ** -0.5)

    def forward() -> tuple[Tensor, ...]:
        return q, k, v, *kernel.forward(q, k, v, tile, score)

    return forward, lambda saved: kernel.backward(dout, *saved, tile, score)

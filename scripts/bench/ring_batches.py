"""Several rectangles of one ring step in scripts/bench/attention.py: one call each, against one varlen call for all of them.

The varlen call gets queries and keys that already stand side by side, and its gradients are left as they are: what a ring would
have to copy and add on top is not in its time, so it is what batching could gain at most.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import ring_wire
import torch
from ring_rank import Row, inputs, loop, resolve
from ring_report import Book

from ds_cp.kernels.attention import Kernel, Score
from ds_cp.kernels.sums import sums_of
from ds_cp.lanes import Lanes
from ds_cp.tiles import Tile


def batches(book: Book, args: argparse.Namespace) -> None:
    wire = ring_wire.Wire(args.device)
    names = [name for name in args.kernels if name in ("flash_attn", "torch_flash")]
    for name, count, (q, k) in itertools.product(names, args.batch_counts, args.batch_shapes):
        row: Row = {"kernel": name, "count": count, "q": q, "k": k}
        for contender, work in CONTENDERS.items():
            book.row("batches", row | {"contender": contender}, work, args, resolve(name, args), name, count, q, k, wire.beside)


def prepared(args: argparse.Namespace, kernel: Kernel, count: int, q: int, k: int) -> tuple[list[Any], list[Tile], list[Any]]:
    """dout, q, k, v side by side; the tiles; out and lse of any rows of scores, as if merged."""
    tensors = inputs(args, max(count * q, count * k), args.heads, args.size)
    tensors = [x[: count * n] for x, n in zip(tensors, (q, q, k, k), strict=True)]
    tiles = [Tile(i * q, (i + 1) * q, i * k, (i + 1) * k) for i in range(count)]
    one = kernel.forward(*tensors[1:], Tile(0, count * q, 0, count * k), Score(args.size**-0.5))
    return tensors, tiles, list(one)


def one_each(
    args: argparse.Namespace, kernel: Kernel, name: str, count: int, q: int, k: int, beside: Any, lanes: bool = False
) -> Row:
    (dout, *qkv), tiles, (out, lse) = prepared(args, kernel, count, q, k)
    score = Score(args.size**-0.5)
    everything = Tile(0, count * q, 0, count * k)
    sums = sums_of(kernel, dout, qkv[0], out, lse, qkv[1].shape[1], [everything, *tiles], score)
    into = sums.new(count * k)
    sums.add(into, everything, *qkv[1:])

    def turns(call: Callable[[Tile], Any]) -> Callable[[], Any]:
        def all_of_them() -> list[Any]:
            both = Lanes(beside if lanes else None)
            found = []
            for turn, tile in enumerate(tiles):
                with both.turn(turn):
                    found.append(call(tile))
            both.join()
            return found

        return all_of_them

    def forward(tile: Tile) -> Any:
        queries, keys = slice(tile.q_start, tile.q_end), slice(tile.k_start, tile.k_end)
        return kernel.forward(qkv[0][queries], qkv[1][keys], qkv[2][keys], tile, score)

    def backward(tile: Tile) -> None:
        sums.add(into, tile, *qkv[1:])
        if sums.full:
            sums.settle()

    return loop(args, "forward", turns(forward)) | loop(args, "backward", turns(backward))


def on_two_streams(*given: Any) -> Row:
    return one_each(*given, lanes=True)


def one_call(args: argparse.Namespace, kernel: Kernel, name: str, count: int, q: int, k: int, beside: Any) -> Row:
    (dout, *qkv), _, (out, lse) = prepared(args, kernel, count, q, k)
    cum_q, cum_k = (torch.arange(0, count * n + 1, n, dtype=torch.int32, device=args.device) for n in (q, k))
    scale, lse = args.size**-0.5, lse.T.contiguous()
    if name == "torch_flash":
        ops, rng = torch.ops.aten, torch.empty(0, device=args.device, dtype=torch.uint64)
        lengths = cum_q, cum_k, q, k, 0.0, False
        return loop(args, "forward", lambda: ops._flash_attention_forward(*qkv, *lengths, False, scale=scale)) | loop(
            args,
            "backward",
            lambda: ops._flash_attention_backward(dout, *qkv, out, lse, *lengths, rng, rng, scale=scale),
        )
    from flash_attn.cute import interface

    options = {"cu_seqlens_q": cum_q, "cu_seqlens_k": cum_k, "max_seqlen_q": q, "max_seqlen_k": k, "softmax_scale": scale}
    options["causal"] = False
    return loop(args, "forward", lambda: interface._flash_attn_fwd(*qkv, return_lse=True, **options)) | loop(
        args, "backward", lambda: interface._flash_attn_bwd(*qkv, out, dout, lse, **options)
    )


CONTENDERS = {"one call each": one_each, "on two streams": on_two_streams, "one varlen call": one_call}

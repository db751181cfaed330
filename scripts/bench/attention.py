"""Ring attention of one rank of R on one GPU: speed, exactness, packed rows, single tiles. bf16; fp32 on CPU.

    python scripts/bench/attention.py --json attention.json                     # every section, some 10 minutes on an H200
    python scripts/bench/attention.py --sections speed --lengths 131072 --ring 8 16 --heads 16/2 --size 256
    python scripts/bench/attention.py --read attention.json --png attention.png # tables and plot of earlier runs, no GPU
    python scripts/bench/attention.py --device cpu --tiny                       # proves the script where there is no GPU

exact    every rank of a ring in lockstep: relative error |x - x_64| / |x_64| of out, dq, dk, dv against the fp64 reference,
         beside the error of the same kernel on the whole row; "ratio" is the worst of the four quotients, above 2 is inexact
speed    ds_cp.ring.RingAttention of the slowest of ranks 0, R // 2, R - 1, one document, zigzag. "efficiency": the time of the
         same kernel on the whole row, divided by R and by the ring's time. "x_rfa", "x_recomp": how many times longer two peers'
         algorithms take on `--peer-kernel` (ring_peers.py says what they are)
packed   rows of several documents, new ones at every step: every rank one after another, the busiest and the mean, beside the
         varlen kernel on the whole row / R. Then steps on rows whose documents no kernel has met ("new"), the same rows again
         ("again") and a typical one over and over ("same"), planning included, by the host's clock
tiles    single calls, for the table behind `attention_kernel: auto`
batches  several rectangles of a step: a call each, on one stream and on two, against one varlen call

Time is between CUDA events: the median of as many calls as fit into --seconds, the host running ahead as in training. A hop is
a copy of the rank's own block on a stream of its own (ring_wire.py): its traffic in memory is there, time on the network is
not. extra_mib is torch.cuda.max_memory_allocated above the inputs, gradients included, of the rank that takes most. The JSON is
written after every row. A row that runs out of memory or fails says so and the others go on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a plain checkout needs no installation

import ring_wire
from ring_batches import batches
from ring_packed import packed
from ring_peers import PEERS
from ring_rank import (
    Row,
    Saver,
    alone,
    any_rank,
    axis,
    causal,
    inputs,
    loop,
    measure,
    resolve,
)
from ring_report import Book, draw, tables

from ds_cp import layout as layouts
from ds_cp.kernels.attention import Kernel, reference
from ds_cp.tiles import Tile

KERNELS = {"cuda": ("flash_attn", "torch_cudnn", "torch_flash", "auto"), "cpu": ("torch_cpu",)}
SECTIONS = ("exact", "speed", "packed", "tiles", "batches")
PARTS = ("out", "dq", "dk", "dv")
DEFAULTS = {  # in full, --quick, --tiny
    "lengths": ([32768, 131072, 262144], [32768, 131072], [128, 256]),
    "ring": ([8], [8], [2, 4]),
    "heads": ((32, 8), (32, 8), (4, 2)),
    "size": (128, 128, 16),
    "seconds": (1.0, 0.3, 0.02),
    "exact_tokens": (4096, 4096, 192),
    "exact_ring": (8, 8, 4),
    "packed_tokens": (131072, 131072, 512),
    "packed_ring": (8, 8, 2),
    "rows": (20, 8, 3),
    "packed_kinds": (["log-normal", "mixture", "half"], ["log-normal", "mixture", "half"], ["log-normal", "mixture", "half"]),
    "packed_layouts": (["balanced", "zigzag"], ["balanced"], ["balanced", "zigzag"]),
    "batch_counts": ([2, 4], [2, 4], [2]),
    "batch_shapes": (
        [(256, 512), (512, 512), (1024, 1024), (2048, 2048), (4096, 4096)],
        [(512, 512), (1024, 1024), (2048, 2048), (4096, 4096)],
        [(16, 32)],
    ),
    "tile_heads": ([(4, 1), (8, 2), (32, 8)], [(4, 1), (32, 8)], [(4, 1)]),
    "tile_sizes": ([64, 128, 256], [128], [16]),
    "tile_queries": ([512, 1024, 2048, 4096, 8192], [512, 2048, 8192], [32]),
    "tile_keys": ([512, 1024, 2048, 4096, 8192, 16384], [1024, 4096, 8192], [32, 64]),
}
# exact


def exact(book: Book, args: argparse.Namespace) -> None:
    tokens, size = args.exact_tokens, args.exact_ring
    tensors = inputs(args, tokens, args.heads, args.size)
    packed = [0, 1, *sorted(tokens * part // 97 for part in (9, 10, 11, 41, 80, 95)), tokens]
    for documents_name, documents in (("one", [0, tokens]), ("packed", packed)):
        wanted = reference_64(tensors, documents)
        for name in (*args.kernels, *({args.peer_kernel} - set(args.kernels))):
            head: Row = {"tokens": tokens, "ring": size, "documents": documents_name, "kernel": name}
            kernel = resolve(name, args)
            tile = causal(args, documents)
            limit = book.row("exact", head | {"contender": "whole row"}, alone_errors, kernel, tile, tensors, wanted)
            peers = PEERS if documents_name == "one" and name == args.peer_kernel else ()
            for contender in (*(f"ring {impl}" for impl in args.impls), *peers):
                work = (lockstep_errors, args, contender, kernel, tensors, documents, wanted, limit)
                book.row("exact", head | {"contender": contender}, *work)


def alone_errors(kernel: Kernel, tile: Tile, tensors: list[Tensor], wanted: list[Tensor]) -> Row:
    forward, backward = alone(kernel, tile, tensors)
    saved = forward()
    return errors([saved[3], *backward(saved)], wanted)


def lockstep_errors(
    args: argparse.Namespace,
    contender: str,
    kernel: Kernel,
    tensors: list[Tensor],
    documents: Sequence[int],
    wanted: list[Tensor],
    limit: Row,
) -> Row:
    """Of out, dq, dk, dv of the whole row from all ranks of a ring."""
    layout = layouts.build("zigzag", documents[-1], args.exact_ring, 1)
    index = [torch.cat([torch.arange(a, b, device=args.device) for a, b in layout.ring_ranges(r)]) for r in range(layout.ring)]

    def one(rank: int, group: Any) -> list[Tensor]:
        place, mine = axis(group, layout.ring, rank), [x[index[rank]] for x in tensors]
        forward, backward = any_rank(args, contender, kernel, documents, place, mine)
        state = forward()
        saved = state.saved_tensors if isinstance(state, Saver) else state
        return [saved[-2], *backward(state)]

    parts = ring_wire.Lockstep(layout.ring).run(one)
    order = torch.argsort(torch.cat(index))
    found = errors([torch.cat(pieces)[order] for pieces in zip(*parts, strict=True)], wanted)
    if "out" not in limit:
        return found
    quotients = [found[part] / limit[part] for part in PARTS]
    return found | {"ratio": max(quotients), "outcome": "ok" if all(q <= 2 for q in quotients) else "inexact"}


def reference_64(tensors: list[Tensor], documents: Sequence[int]) -> list[Tensor]:
    """One key/value head at a time, which bounds the memory."""
    tile = Tile(0, documents[-1], 0, documents[-1], tuple(documents))
    parts = []
    for head in range(tensors[2].shape[1]):
        forward, backward = alone(reference, tile, [x.unflatten(1, (tensors[2].shape[1], -1))[:, head].double() for x in tensors])
        saved = forward()
        parts.append([saved[3], *backward(saved)])
    return [torch.cat(heads, 1) for heads in zip(*parts, strict=True)]


def errors(found: Sequence[Tensor], wanted: list[Tensor]) -> Row:
    pairs = zip(PARTS, found, wanted, strict=True)
    return {part: float((x.double() - w).norm() / w.norm()) for part, x, w in pairs}


# speed


def speed(book: Book, args: argparse.Namespace) -> None:
    wire = ring_wire.Wire(args.device)
    single = [name for name in args.kernels if large_kernel(name, args) == name or large_kernel(name, args) not in args.kernels]
    for tokens in args.lengths:
        base: dict[str, Row] = {}
        for name in single:
            head: Row = {"tokens": tokens, "ring": 1, "kernel": name, "contender": "whole row"}
            if args.whole_row:
                base[large_kernel(name, args)] = book.row("speed", head, whole_row, args, name, [0, tokens])
        for size in args.ring:
            head = {"tokens": tokens, "ring": size}
            middle = [] if args.quick else [size // 2]
            places = [axis(wire, size, r) for r in (range(size) if args.all_ranks else sorted({0, *middle, size - 1}))]
            peers = []
            for peer in PEERS if args.peers else ():
                row = head | {"kernel": args.peer_kernel, "contender": peer}
                peers.append(book.row("speed", row, slowest, args, peer, args.peer_kernel, places, [0, tokens], {}, []))
            for name, impl in itertools.product(args.kernels, args.impls):
                row = head | {"kernel": name, "contender": f"ring {impl}"}
                whole = base.get(large_kernel(name, args), {})
                book.row("speed", row, slowest, args, row["contender"], name, places, [0, tokens], whole, peers)


def whole_row(args: argparse.Namespace, name: str, documents: Sequence[int]) -> Row:
    kernel, tensors = resolve(name, args), inputs(args, documents[-1], args.heads, args.size)
    return measure(args, *alone(kernel, causal(args, documents), tensors), kernel)


def one_rank(args: argparse.Namespace, contender: str, name: str, documents: Sequence[int], place: Any) -> Row:
    kernel, tensors = resolve(name, args), inputs(args, documents[-1] // place.size, args.heads, args.size)
    return measure(args, *any_rank(args, contender, kernel, documents, place, tensors), kernel)


def slowest(
    args: argparse.Namespace, contender: str, name: str, places: list[Any], documents: list[int], whole: Row, peers: list[Row]
) -> Row:
    """The figures of the slowest rank, beside the whole row on one GPU and the peers."""
    found = {place.rank: one_rank(args, contender, name, documents, place) for place in places}
    rank = max(found, key=lambda r: found[r]["total_ms"])
    row = found[rank] | {"rank": rank, "all_ranks": found}
    if args.device == "cuda":
        row["extra_mib"] = max(other["extra_mib"] for other in found.values())
    if "total_ms" in whole:
        row["efficiency"] = whole["total_ms"] / places[0].size / row["total_ms"]
    for key, peer in zip(("x_rfa", "x_recomp"), peers, strict=False):
        row[key] = peer["total_ms"] / row["total_ms"] if "total_ms" in peer else None
    return row


def large_kernel(name: str, args: argparse.Namespace) -> str:
    """The kernel's module, for `auto` the one that computes a whole row."""
    kernel = resolve(name, args)
    return getattr(kernel, "large", kernel).__name__.split(".")[-1]


# tiles


def single_tiles(book: Book, args: argparse.Namespace) -> None:
    kernels = [name for name in args.kernels if name != "auto"]  # it is two of these
    for heads, size, name, (kind, q, k) in itertools.product(args.tile_heads, args.tile_sizes, kernels, tile_shapes(args)):
        row = {"heads": f"{heads[0]}/{heads[1]}", "size": size, "kind": kind, "q": q, "k": k, "kernel": name}
        book.row("tiles", row, one_tile, args, resolve(name, args), kind, (q, k), heads, size)


def tile_shapes(args: argparse.Namespace) -> list[tuple[str, int, int]]:
    rectangles = [(q, k) for q, k in itertools.product(args.tile_queries, args.tile_keys) if q <= 2 * k <= 8 * q]
    return [("causal", n, n) for n in args.tile_queries] + [("full", q, k) for q, k in rectangles]


def one_tile(args: argparse.Namespace, kernel: Kernel, kind: str, shape: tuple[int, int], heads: tuple[int, int], size: int) -> Row:
    tensors = inputs(args, max(shape), heads, size)
    tensors = [x[:n] for x, n in zip(tensors, (shape[0], shape[0], shape[1], shape[1]), strict=True)]
    tile = causal(args, [0, shape[0]]) if kind == "causal" else Tile(0, shape[0], 0, shape[1])
    forward, backward = alone(kernel, tile, tensors)
    row = loop(args, "forward", forward)
    saved = forward()
    return row | loop(args, "backward", lambda: backward(saved))


def parse() -> argparse.Namespace:
    def heads(text: str) -> tuple[int, int]:
        query, kv = text.split("/")
        return int(query), int(kv)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", choices=SECTIONS, nargs="+", default=list(SECTIONS))
    parser.add_argument("--device", choices=list(KERNELS), default="cuda")
    parser.add_argument("--kernels", nargs="+", help="all that are installed")
    parser.add_argument("--impls", choices=("p2p", "allgather"), nargs="+", default=["p2p", "allgather"])
    parser.add_argument(
        "--whole-row", action=argparse.BooleanOptionalAction, default=True, help="speed: time it, for the efficiency"
    )
    parser.add_argument("--lanes", action=argparse.BooleanOptionalAction, default=True, help="ring steps on two streams")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peer-kernel", help="torch_flash; on CPU torch_cpu")
    parser.add_argument("--lengths", type=int, nargs="+", help="speed: tokens of the row (32768 131072 262144)")
    parser.add_argument("--ring", type=int, nargs="+", help="speed: ranks (8)")
    parser.add_argument("--all-ranks", action="store_true", help="speed: time every rank")
    parser.add_argument("--heads", type=heads, help="query/key heads (32/8)")
    parser.add_argument("--size", type=int, help="head size (128)")
    parser.add_argument("--seconds", type=float, help="to spend on timing one rank or row, beside two calls to warm up (1)")
    parser.add_argument("--calls", type=int, default=20, help="at most, of one rank or row")
    parser.add_argument("--exact-tokens", type=int, help="(4096)")
    parser.add_argument("--exact-ring", type=int, help="(8)")
    parser.add_argument("--packed-tokens", type=int, help="(131072)")
    parser.add_argument("--packed-ring", type=int, help="(8)")
    parser.add_argument("--packed-kinds", nargs="+", help="(log-normal mixture half)")
    parser.add_argument("--packed-layouts", nargs="+", help="(balanced zigzag)")
    parser.add_argument(
        "--novelty", action=argparse.BooleanOptionalAction, default=True, help="packed: new rows against the same again"
    )
    parser.add_argument("--rows", type=int, help="packed: rows with documents of their own (20)")
    parser.add_argument("--tile-heads", type=heads, nargs="+", help="(4/1 8/2 32/8)")
    parser.add_argument("--tile-sizes", type=int, nargs="+", help="(64 128 256)")
    parser.add_argument("--tile-queries", type=int, nargs="+", help="(512 to 8192)")
    parser.add_argument("--tile-keys", type=int, nargs="+", help="(512 to 16384), those from q / 2 to 4 q")
    parser.add_argument("--tile-seconds", type=float, default=0.06, help="to spend on one direction")
    parser.add_argument("--deadline", type=float, default=1e6, help="seconds after which no row is begun")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, ranks 0 and R - 1, 0.3 s each")
    parser.add_argument("--tiny", action="store_true", help="hundreds of tokens: proves the script")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here, after every row")
    parser.add_argument("--read", type=Path, nargs="+", help="measure nothing; tables and plot of these JSON files")
    parser.add_argument("--png", type=Path, help="draw efficiency over length here")
    args = parser.parse_args()
    for key, values in DEFAULTS.items():
        if getattr(args, key, None) is None:
            setattr(args, key, values[2 if args.tiny else 1 if args.quick else 0])
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    args.peer_kernel = args.peer_kernel or ("torch_flash" if args.device == "cuda" else "torch_cpu")
    return args


def announce(section: str, args: argparse.Namespace) -> None:
    """How long it will take, so that a loan can be planned. Large rows take longer: three calls at least."""
    kernels, impls, ranks = len(args.kernels), len(args.impls), 2 if args.quick else 3
    rings, peers, tiles = (
        len(args.ring),
        len(PEERS) * args.peers,
        len(tile_shapes(args)) * len(args.tile_heads) * len(args.tile_sizes),
    )
    rows, seconds = {
        "exact": (2 * kernels * (1 + impls) + peers, 1.0),
        "speed": (len(args.lengths) * (kernels + rings * (peers + kernels * impls)), 1.5 * ranks * args.seconds),
        "packed": (len(args.packed_kinds) * kernels * (1 + impls * len(args.packed_layouts)), 0.5 * args.rows),
        "batches": (6 * len(args.batch_counts) * len(args.batch_shapes), 3 * args.tile_seconds),
        "tiles": (tiles * kernels, 3 * args.tile_seconds),
    }[section]
    print(f"{section}: {rows} rows, about {rows * seconds:.0f} s without compilation", flush=True)


def installed(args: argparse.Namespace) -> list[str]:
    names = []
    for name in args.kernels or KERNELS[args.device]:
        try:
            resolve(name, args)
            names.append(name)
        except ValueError as error:
            print(f"left out: {error}", flush=True)
    return names


def main() -> None:
    args = parse()
    rows = [row for path in args.read or () for row in json.loads(path.read_text())["rows"]]
    if not args.read:
        args.kernels = installed(args)
        ring_wire.install()
        book = Book(args)
        print(json.dumps(book.about), flush=True)
        run = {"exact": exact, "speed": speed, "packed": packed, "tiles": single_tiles, "batches": batches}
        for section in args.sections:
            announce(section, args)
            run[section](book, args)
        rows = book.rows
    tables(rows)
    if args.png:
        draw(rows, args.png)
    if any(row["outcome"].startswith(("failed", "inexact")) for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

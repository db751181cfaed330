"""Rows of several documents in scripts/bench/attention.py: every rank of a ring, one after another, and rows that are new.

Three kinds of rows, as in balance.py. A rank's time is that of its steps on one row after another, each with documents of its own,
the host running ahead; the whole row is the varlen kernel's on the same rows, timed again after every rank: clocks change.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import ring_wire
from ring_rank import Row, alone, axis, causal, inputs, milliseconds, now, ours, resolve, ring_context, synchronized
from ring_report import Book

PASSES = 5  # over the rows, after one that warms up


def row_of_documents(kind: str, tokens: int, seed: int) -> list[int]:
    """Boundaries. log-normal: of lengths with median exp(7.5) = 1,808 and sigma 1.6; mixture: with a half and a quarter of the row
    among them; half: half the row, then 100 to 4,000 tokens each. Scaled down for rows shorter than 131,072 tokens.
    """
    draw, scale = random.Random(seed), min(tokens / 131072, 1.0)
    first = {"log-normal": [], "mixture": [tokens // 2, tokens // 4], "half": [tokens // 2]}[kind]
    lengths = list(first)
    while (left := tokens - sum(lengths)) > 0:
        length = draw.randint(100, 4000) if kind == "half" else draw.lognormvariate(7.5, 1.6)
        lengths.append(min(max(int(length * scale), 1), left))
    if kind == "mixture":
        draw.shuffle(lengths)
    return [0, *accumulate(lengths)]


def packed(book: Book, args: argparse.Namespace) -> None:
    places = [axis(ring_wire.Wire(args.device), args.packed_ring, r) for r in range(args.packed_ring)]
    for kind, name in itertools.product(args.packed_kinds, args.kernels):
        rows = [row_of_documents(kind, args.packed_tokens, seed) for seed in range(args.rows)]
        documents = f"{kind}, {len(rows)} rows of {min(map(len, rows)) - 1} to {max(map(len, rows)) - 1}"
        head: Row = {"tokens": args.packed_tokens, "ring": args.packed_ring, "documents": documents, "kernel": name}
        book.row("packed", head | {"contender": "whole row / R"}, whole_rows, args, name, rows)
        for impl, layout in itertools.product(args.impls, args.packed_layouts):
            row = head | {"contender": f"ring {impl}, {layout}"}
            book.row("packed", row, every_rank, args, name, impl, layout, rows, places)
    plans_last = sorted(args.kernels, key=lambda name: name == "torch_cudnn")  # whose plans `auto` would find
    for name, impl in itertools.product(plans_last, args.impls if args.novelty else ()):
        head = {"tokens": args.packed_tokens, "ring": args.packed_ring, "documents": f"{args.rows} rows", "kernel": name}
        book.row("packed", head | {"contender": f"ring {impl}, auto"}, novelty, args, name, impl, places[-1])


def one_after_another(args: argparse.Namespace, steps: Sequence[Callable[[], Any]], passes: int = PASSES) -> list[float]:
    """Milliseconds of each step: the median of so many passes over all of them."""
    for step in steps:
        step()
    synchronized(args.device)
    marks = []
    for _ in range(passes):
        marks.append([now(args.device)])
        for step in steps:
            step()
            marks[-1].append(now(args.device))
    synchronized(args.device)
    found = [[milliseconds(a, b) for a, b in itertools.pairwise(line)] for line in marks]
    return [statistics.median(times) for times in zip(*found, strict=True)]


def whole_rows(args: argparse.Namespace, name: str, rows: list[list[int]]) -> Row:
    times = one_after_another(args, whole_steps(args, name, rows))
    return {"calls": 1, "mean_ms": statistics.mean(times) / args.packed_ring}


def whole_steps(args: argparse.Namespace, name: str, rows: list[list[int]]) -> list[Callable[[], Any]]:
    kernel, tensors = resolve(name, args), inputs(args, args.packed_tokens, args.heads, args.size)

    def step(documents: list[int]) -> Callable[[], Any]:
        forward, backward = alone(kernel, causal(args, documents), tensors)
        return lambda: backward(forward())

    return [step(documents) for documents in rows]


def every_rank(args: argparse.Namespace, name: str, impl: str, layout: str, rows: list[list[int]], places: list[Any]) -> Row:
    """busiest_ms and mean_ms: of the ranks, the mean of all rows. busiest/mean and busiest/whole: of these; "worst": of any row."""
    kernel, calls, by_rank, by_turn = resolve(name, args), [], [], []
    whole = whole_steps(args, name, rows)
    for place in places:
        contexts = [ring_context(args, kernel, documents, place, impl, layout) for documents in rows]
        calls += [sum(map(len, context.plans[None].steps)) for context in contexts]
        tokens = max(context.layout.length for context in contexts) // place.size
        tensors = inputs(args, tokens, args.heads, args.size)

        def step(context: Any, tensors: list[Any] = tensors, ranks: int = place.size) -> Callable[[], Any]:
            forward, backward = ours(context, [x[: context.layout.length // ranks] for x in tensors])
            return lambda: backward(forward())

        by_rank.append(one_after_another(args, [step(context) for context in contexts]))
        by_turn.append(one_after_another(args, whole, passes=1))
    busiest, mean = [max(times) for times in zip(*by_rank, strict=True)], [statistics.mean(x) for x in zip(*by_rank, strict=True)]
    share = [statistics.median(times) / args.packed_ring for times in zip(*by_turn, strict=True)]
    row: Row = {"busiest_ms": statistics.mean(busiest), "mean_ms": statistics.mean(mean), "calls": max(calls)}
    row["busiest/mean"] = row["busiest_ms"] / row["mean_ms"]
    row["worst/mean"] = max(a / b for a, b in zip(busiest, mean, strict=True))
    row["busiest/whole"] = row["busiest_ms"] / statistics.mean(share)
    row["worst/whole"] = max(a / b for a, b in zip(busiest, share, strict=True))
    return row | {"all_ranks": by_rank, "whole_ms": share}


def novelty(args: argparse.Namespace, name: str, impl: str, place: Any) -> Row:
    """Milliseconds a step, planning included, by the host's clock. Same rows for every kernel."""
    kernel, tensors = resolve(name, args), inputs(args, 2 * args.packed_tokens // place.size, args.heads, args.size)
    rows = [row_of_documents("log-normal", args.packed_tokens, seed) for seed in range(1, 4 + args.rows)]

    def steps(rows: list[list[int]]) -> float:
        start = synchronized(args.device)
        for documents in rows:
            context = ring_context(args, kernel, documents, place, impl, "auto")
            forward, backward = ours(context, [x[: context.layout.length // place.size] for x in tensors])
            backward(forward())
        return (synchronized(args.device) - start) * 1000 / len(rows)

    def pairs(documents: list[int]) -> int:
        steps = ring_context(args, None, documents, place, impl, "auto").plans[None].steps
        return sum(tile.pairs for step in steps for tile in step)

    steps(rows[:3])  # compiles
    rows = rows[3:]
    typical = sorted(rows, key=pairs)[len(rows) // 2]
    found: Row = {"new_ms": steps(rows), "again_ms": steps(rows)}
    steps([typical] * 2)
    found["same_ms"] = steps([typical] * len(rows))
    start = time.perf_counter()
    for documents in rows:
        ring_context(args, None, documents, place, impl, "auto")
    found["plan_ms"] = (time.perf_counter() - start) * 1000 / len(rows)
    return found | {"new/again": found["new_ms"] / found["again_ms"], "new/same": found["new_ms"] / found["same_ms"]}

"""How evenly a layout spreads attention over ring ranks, from integers: no GPU, no process group.

    python scripts/bench/balance.py --out docs/data/balance.json

Five kinds of rows of 262,144 tokens, 4, 8 and 16 ring ranks, three layouts. "even" is the work (pairs of a query and a key that it
attends) of the mean rank over that of the busiest. zigzag_documents, the classic varlen ring, pads every document to 2R pieces and
gives each rank two of them: all ranks do the same work, "even" counts what the padding adds, and "padding" its tokens. "calls" are
the kernel calls of the rank with most in one direction, "sent" the hops that blocks make over those of a whole turn. "plan" is the
time of laying out the row and planning one rank, the best of five.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ds_cp import balance, tiles
from ds_cp import layout as layouts

TOKENS = 2**18
RINGS = (4, 8, 16)


def rows(seed: int) -> dict[str, list[int]]:
    """Lengths of the documents of each kind of row."""
    draw = random.Random(seed)
    log_normal = fill([], lambda: int(draw.lognormvariate(7.5, 1.6)))
    few = [TOKENS // 2, TOKENS // 4]
    return {
        "one document": [TOKENS],
        "log-normal (7.5, 1.6)": log_normal,
        "log-normal, a half and a quarter": shuffled(draw, fill(few, lambda: int(draw.lognormvariate(7.5, 1.6)))),
        "100 to 4,000 tokens": fill([], lambda: draw.randint(100, 4000)),
        "a half, then 100 to 4,000": fill([TOKENS // 2], lambda: draw.randint(100, 4000)),
    }


def fill(lengths: list[int], draw: Callable[[], int]) -> list[int]:
    """`lengths` and as many more as the row takes; the last is cut."""
    lengths = list(lengths)
    while (left := TOKENS - sum(lengths)) > 0:
        lengths.append(min(max(draw(), 1), left))
    return lengths


def shuffled(draw: random.Random, lengths: list[int]) -> list[int]:
    draw.shuffle(lengths)
    return lengths


def triangle(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def of_layout(name: str, documents: Sequence[int], ring: int) -> dict[str, Any]:
    plan = layouts.build(name, documents[-1], ring, 1, documents)
    whole = balance.padded(documents, plan.length)
    plans = [tiles.plan(plan, rank, whole) for rank in range(ring)]
    work = [sum(tile.pairs for step in found.steps for tile in step) for found in plans]
    assert sum(work) == sum(triangle(end - start) for start, end in pairwise(whole))
    return {
        "even": sum(work) / ring / max(work),
        "padding": plan.length / documents[-1] - 1,
        "calls": max(sum(map(len, found.steps)) for found in plans),
        "sent": sum(plans[0].reach) / (ring * (ring - 1)),
        "chunks_per_rank": len(plan.chunks[0]),
        "plan_ms": best_ms(lambda: tiles.plan(layouts.build(name, documents[-1], ring, 1, documents), ring - 1, whole)),
    }


def of_zigzag_documents(documents: Sequence[int], ring: int) -> dict[str, Any]:
    lengths = [end - start for start, end in pairwise(documents)]
    padded = [-(-n // (2 * ring)) * 2 * ring for n in lengths]
    return {
        "even": sum(map(triangle, lengths)) / sum(map(triangle, padded)),
        "padding": sum(padded) / sum(lengths) - 1,
        "calls": 1 + 2 * (ring - 1),  # varlen calls over all documents
        "sent": 1.0,
    }


def best_ms(call: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)


def planning() -> dict[str, Any]:
    """4,096 documents, a million tokens, 64 ranks."""
    draw, tokens = random.Random(1), 2**20
    documents = (0, *sorted(draw.sample(range(1, tokens), 4095)), tokens)
    return {name: of_layout(name, documents, 64)["plan_ms"] for name in ("zigzag", "balanced")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    for kind, lengths in rows(args.seed).items():
        documents = (0, *accumulate(lengths))
        for ring in RINGS:
            by_layout = {name: of_layout(name, documents, ring) for name in ("zigzag", "balanced")}
            by_layout["zigzag_documents"] = of_zigzag_documents(documents, ring)
            found.append({"row": kind, "documents": len(lengths), "ring": ring, **by_layout})
    result = {"tokens": TOKENS, "seed": args.seed, "rows": found, "plan_ms_4096_documents_64_ranks": planning()}
    result["machine"] = {"python": platform.python_version(), "processor": platform.machine()}
    show(result)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def show(result: dict[str, Any]) -> None:
    table = Table(
        "row", "documents", "ring", "zigzag", "zigzag_documents (padding)", "balanced", "chunks", "calls", "sent", "plan ms"
    )
    for row in result["rows"]:
        mine, classic = row["balanced"], row["zigzag_documents"]
        table.add_row(
            row["row"],
            str(row["documents"]),
            str(row["ring"]),
            f"{row['zigzag']['even']:.3f}",
            f"{classic['even']:.3f} ({classic['padding']:.1%})",
            f"{mine['even']:.3f}",
            str(mine["chunks_per_rank"]),
            f"{mine['calls']} (zigzag {row['zigzag']['calls']})",
            f"{mine['sent']:.2f}",
            f"{mine['plan_ms']:.1f}",
        )
    Console().print(table)
    Console().print("planning 4,096 documents of 1,048,576 tokens for 64 ranks, ms:", result["plan_ms_4096_documents_64_ranks"])


if __name__ == "__main__":
    main()

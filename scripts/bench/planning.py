"""What a rank's host does with a row before its forward pass, by part: milliseconds, the least of several runs, on one CPU core.

    python scripts/bench/planning.py                       # 1,048,576 tokens in 4,096 documents, rank 5 of a ring of 64

documents  boundaries from position_ids      layout  chunks to ranks      tiles  this rank's tiles
prepare    all of these, and this rank's part of every tensor            same row  the hash that ranks compare
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from ds_cp import batch as batches
from ds_cp import layout
from ds_cp.mesh import AxisGroup, Mesh
from ds_cp.models.same_row import fingerprint
from ds_cp.placement import Methods


def packed(tokens: int, documents: int) -> dict[str, torch.Tensor]:
    """One row of documents of random lengths."""
    torch.manual_seed(0)
    bounds = [0, *sorted((torch.randperm(tokens - 1)[: documents - 1] + 1).tolist()), tokens]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])
    ids = torch.randint(0, 32_000, (1, tokens))
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions.unsqueeze(0)}


def one_rank(ring: int) -> Mesh:
    """Rank 5 of a ring, without processes: planning asks nobody."""
    axis, alone = AxisGroup(None, tuple(range(ring)), 5 % ring), AxisGroup(None, (0,), 0)
    return Mesh(topology=SimpleNamespace(), ulysses=alone, ring=axis, seq=axis, data=alone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--documents", type=int, default=4096)
    parser.add_argument("--ring", type=int, default=64)
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    batch, mesh, device = packed(args.tokens, args.documents), one_rank(args.ring), torch.device("cpu")
    methods = Methods(attention=None, layout="auto")
    rows, documents = batches._stream(batch, batch["input_ids"])
    plan = layout.build("auto", rows.tokens, args.ring, 1, documents)
    whole = batches._with_padding(documents, plan.length)
    parts: dict[str, Callable[[], Any]] = {
        "documents": lambda: batches._stream(batch, batch["input_ids"]),
        "layout": lambda: layout.build("auto", rows.tokens, args.ring, 1, documents),
        "tiles": lambda: batches._plans(plan, mesh, whole, methods, False, device),
        "prepare": lambda: batches.prepare(batch, mesh, methods, device),
        "same row": lambda: [fingerprint(key, value) for key, value in batch.items()],
    }
    for name, part in parts.items():
        print(f"{name:<10} {min(seconds(part) for _ in range(args.runs)) * 1e3:6.1f} ms")


def seconds(part: Callable[[], Any]) -> float:
    start = time.perf_counter()
    part()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

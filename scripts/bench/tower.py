"""A vision tower on one rank of a row against the tower on all images of the row: patches, and seconds of forward and backward.

    python scripts/bench/tower.py --json docs/data/tower.json
    python scripts/bench/tower.py --tiny      # one small block: proves the script

Qwen3-VL's tower with 3 blocks of 192, one CPU thread, rows of images of one size, of mixed sizes, and with one that is larger than
all others together; best of three, the busiest rank counts. What ranks exchange afterwards is not in it.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from ds_cp.models.vision import deal

REPEATS = 3


def rows(seed: int) -> dict[str, list[tuple[int, int]]]:
    """Height and width in patches of the images of each kind of row."""
    draw = random.Random(seed)
    sides = [4, 6, 8, 12, 16, 20]
    return {
        "16 images of 16 x 16": [(16, 16)] * 16,
        "24 images of mixed sizes": [(draw.choice(sides), draw.choice(sides)) for _ in range(24)],
        "one of 32 x 32, 6 of 8 x 8": [(32, 32), *[(8, 8)] * 6],
    }


def seconds(tower: nn.Module, pixels: Tensor, grid: Tensor) -> float:
    """Forward and backward, the best of some."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        output = tower(pixels, grid_thw=grid)
        sum(x.sum() for x in (output.pooler_output, *output.deepstack_features)).backward()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(tower: nn.Module, sizes: list[tuple[int, int]], ranks: int) -> dict[str, Any]:
    grid = torch.tensor([(1, *size) for size in sizes])
    patches = grid.prod(-1).tolist()
    pixels = torch.randn(sum(patches), 3 * 2 * 16 * 16)
    owners, images = deal(patches, ranks), pixels.split(patches)
    load = [sum(n for n, owner in zip(patches, owners, strict=True) if owner == rank) for rank in range(ranks)]
    busiest = max(range(ranks), key=lambda rank: load[rank])
    own = [i for i, owner in enumerate(owners) if owner == busiest]
    share = seconds(tower, torch.cat([images[i] for i in own]), grid[own])
    whole = seconds(tower, pixels, grid)
    found = {"patches": sum(patches), "share_of_patches": load[busiest] / sum(patches)}
    return {**found, "seconds": whole, "share_of_seconds": share / whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="one small block: proves the script")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    depth, hidden = (1, 16) if arguments.tiny else (3, 192)
    config = Qwen3VLVisionConfig(
        depth=depth,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_heads=4,
        out_hidden_size=256,
        deepstack_visual_indexes=[*range(depth)],
    )
    tower = Qwen3VLVisionModel._from_config(config, attn_implementation="sdpa")
    found = {name: measure(tower, sizes, arguments.ranks) for name, sizes in rows(seed=1).items()}
    table = Table(title=f"vision tower, busiest rank of {arguments.ranks} against the whole row")
    for column in ("row", "patches", "share of patches", "s, whole", "share of s"):
        table.add_column(column)
    for name, row in found.items():
        figures = f"{row['share_of_patches']:.3f}", f"{row['seconds']:.3f}", f"{row['share_of_seconds']:.3f}"
        table.add_row(name, str(row["patches"]), *figures)
    Console().print(table)
    if arguments.json:
        head = {
            "script": "scripts/bench/tower.py",
            "ranks": arguments.ranks,
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        arguments.json.write_text(json.dumps({**head, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

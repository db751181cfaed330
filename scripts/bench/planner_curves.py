"""Curves drawn from `ds-cp plan`'s model, to 1,024 GPUs and 16 M tokens: predictions, nothing is measured.

    python scripts/bench/planner_curves.py --png docs/planner.png        # half a minute
    python scripts/bench/planner_curves.py --gpus 8 64 --lengths 131072  # two points

Llama-8B on H100s, hosts of 8 over InfiniBand 400G: the best choice for each length and number of GPUs. Rows of several replicas
count in tokens/s; a step is one row a replica. What is drawn is printed too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from planner_check import LLAMA_8B, llama

from ds_cp.planner import machine as machines
from ds_cp.planner import search
from ds_cp.planner.machine import GIB

LENGTHS = (131_072, 1_048_576, 4_194_304, 16_777_216)
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
Found = dict[tuple[int, int], search.Row]


def best(lengths: Sequence[int], counts: Sequence[int]) -> Found:
    """{(length, GPUs): the best choice}, without those where nothing fits."""
    shape, found = llama(*LLAMA_8B, 32), {}
    for gpus in counts:
        where = machines.build(gpus, 8, "h100", 0, "nvlink", "infiniband-400g", 1800)
        for length in lengths:
            rows = search.plan(shape, where, (0, length)).rows
            if rows:
                found[length, gpus] = rows[0]
    return found


def curves(found: Found, lengths: Sequence[int], counts: Sequence[int], png: Path) -> None:
    """The best choice's tokens/s of a GPU, its step, and its memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.4))
    for length in lengths:
        mine = [gpus for gpus in counts if (length, gpus) in found]
        rows = [found[length, gpus] for gpus in mine]
        label = f"{length // 1024:,} K tokens" if length < 2**20 else f"{length // 2**20} M tokens"
        axes[0].plot(mine, [row.tokens_per_second for row in rows], "o-", label=label)
        axes[1].plot(mine, [row.times.seconds for row in rows], "o-", label=label)
        axes[2].plot(mine, [row.memory.peak / GIB for row in rows], "o-", label=label)
    for axis, title in zip(axes, ("tokens/s of a GPU", "seconds a step", "GiB of a GPU"), strict=True):
        axis.set(title=title, xlabel="GPUs", xscale="log")
        axis.set_xticks(counts, [str(gpus) for gpus in counts])
        axis.minorticks_off()
    axes[0].set_yscale("log")
    axes[1].set_yscale("log")
    axes[2].set_ylim(bottom=0)
    axes[2].legend(fontsize=8, loc="lower right")
    figure.suptitle("PREDICTION by ds-cp plan, not measured: Llama-8B, H100 80 GB, hosts of 8, InfiniBand 400G; best choice each")
    figure.tight_layout()
    figure.savefig(png, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--png", type=Path, default=Path("planner.png"))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of a row (to 16,777,216)")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, help="(8 to 1024)")
    args = parser.parse_args()
    found = best(args.lengths, args.gpus)
    for (length, gpus), row in found.items():
        figures = f"{row.tokens_per_second:8.0f} tokens/s a GPU {row.times.seconds:9.2f} s {row.memory.peak / GIB:6.1f} GiB"
        print(f"{length:10,} tokens {gpus:5,} GPUs: {figures}")
    curves(found, args.lengths, args.gpus, args.png)


if __name__ == "__main__":
    main()

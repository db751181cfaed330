"""Curves drawn from `ds-cp plan`'s model, to 1,024 GPUs and 16 M tokens: predictions, nothing is measured.

    python scripts/bench/planner_curves.py --png docs/planner.png        # half a minute

Llama-8B on H100s, hosts of 8 over InfiniBand 400G: the best choice for each length and number of GPUs. Rows of several replicas
count in tokens/s; a step is one row a replica.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from planner_check import LLAMA_8B, llama

from ds_cp.planner import machine as machines
from ds_cp.planner import search
from ds_cp.planner.machine import GIB

LENGTHS = (131_072, 1_048_576, 4_194_304, 16_777_216)
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


def curves(png: Path) -> None:
    """The best choice's tokens/s of a GPU, its step, and its memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shape, found = llama(*LLAMA_8B, 32), {}
    for gpus in GPUS:
        where = machines.build(gpus, 8, "h100", 0, "nvlink", "infiniband-400g", 1800)
        for length in LENGTHS:
            rows = search.plan(shape, where, (0, length)).rows
            if rows:
                found[length, gpus] = rows[0]
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.4))
    for length in LENGTHS:
        mine = [gpus for gpus in GPUS if (length, gpus) in found]
        rows = [found[length, gpus] for gpus in mine]
        label = f"{length // 1024:,} K tokens" if length < 2**20 else f"{length // 2**20} M tokens"
        axes[0].plot(mine, [row.tokens_per_second for row in rows], "o-", label=label)
        axes[1].plot(mine, [row.times.seconds for row in rows], "o-", label=label)
        axes[2].plot(mine, [row.memory.peak / GIB for row in rows], "o-", label=label)
    for axis, title in zip(axes, ("tokens/s of a GPU", "seconds a step", "GiB of a GPU"), strict=True):
        axis.set(title=title, xlabel="GPUs", xscale="log")
        axis.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
        axis.minorticks_off()
    axes[0].set_yscale("log")
    axes[1].set_yscale("log")
    axes[2].set_ylim(bottom=0)
    axes[2].legend(fontsize=8, loc="lower right")
    figure.suptitle("PREDICTION by ds-cp plan, not measured: Llama-8B, H100 80 GB, hosts of 8, InfiniBand 400G; best choice each")
    figure.tight_layout()
    figure.savefig(png, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--png", type=Path, default=Path("planner.png"))
    curves(parser.parse_args().png)

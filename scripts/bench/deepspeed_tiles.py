"""DeepSpeed's own tiles, `TiledFusedLogitsLoss`, `TiledMLP` and `SequenceTiledCompute`, under its engine: gradients against one
process without tiles.

    python scripts/bench/deepspeed_tiles.py --json docs/data/deepspeed_tiles.json      # two gloo ranks, fp32, CPU, a minute

A layer, an MLP and a head on 20 tokens a rank. `ratio` is the least-squares scale of a gradient (1 is right), `error` its worst
entry over the largest of one process; both of the worst parameter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

import torch  # noqa: E402  (the paths and the environment come first)
from alst import machine, show  # noqa: E402
from rich.console import Console  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from ds_cp.selftest import LR  # noqa: E402
from tests.dist.pool import Pool, WorkerError  # noqa: E402

TOKENS, HIDDEN, VOCABULARY, WORLD = 20, 16, 40, 2
CASES = ((0, 1), (1, 1), (1, 2), (2, 2), (3, 1), (3, 2))
"""(ZeRO stage, micro-batches of a step)."""
WAYS = {
    "loss, sum over tiles, divided by the targets": {"tiles": 4, "loss": "sum"},
    "loss, mean over tiles, as many targets in each": {"tiles": 4, "loss": "mean", "all_targets": True},
    "loss, mean over tiles, unequal targets": {"tiles": 4, "loss": "mean"},
    "MLP, 4 tiles": {"tiles": 4, "mlp": True},
    "MLP, 8 tiles asked for, of which 20 tokens make 7": {"tiles": 8, "mlp": True},
    "any computation, a loss, sum over tiles, divided by the targets": {"tiles": 4, "loss": "sum", "compute": True},
    "any computation, a loss, mean over tiles, as many targets in each": {
        "tiles": 4,
        "loss": "mean",
        "compute": True,
        "all_targets": True,
    },
    "any computation, a loss, mean over tiles, unequal targets": {"tiles": 4, "loss": "mean", "compute": True},
    "any computation, an MLP, 4 tiles": {"tiles": 4, "mlp": True, "compute": True},
    "any computation, an MLP, 8 tiles asked for, of which 20 tokens make 7": {"tiles": 8, "mlp": True, "compute": True},
}


class Net(nn.Module):
    def __init__(self, tiles: int = 1, loss: str = "", mlp: bool = False, compute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tiles, self.loss, self.in_tiles, self.compute = tiles, loss, mlp, compute
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 24, bias=False), nn.Linear(24, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP, sequence_tiled_compute

        def tiled(fn: Any, shard: dict[str, Tensor], parameters: list[Tensor], dimension: int, reduction: str | None) -> Tensor:
            keys = [*shard]
            rest = {"compute_params": parameters, "output_unshard_dimension": dimension, "output_reduction": reduction}
            return sequence_tiled_compute(fn, x.shape[1], self.tiles, shard, {}, keys[0], **rest)

        def mlp(net: Net, part: Tensor) -> Tensor:
            return net.down(torch.tanh(net.up(part)))

        def loss(net: Net, hidden: Tensor, targets: Tensor) -> Tensor:
            return functional.cross_entropy(net.head(hidden).flatten(0, -2), targets.flatten(), reduction=self.loss or "mean")

        h = self.first(x)
        inner = [self.up.weight, self.down.weight]
        if self.in_tiles and self.compute:
            h = h + tiled(lambda part: mlp(self, part), {"part": h}, inner, 1, None)
        else:
            h = h + (TiledMLP.apply(mlp, self, h, self.tiles, inner) if self.in_tiles else mlp(self, h))
        if not self.loss:
            return loss(self, h, y)
        if self.compute:
            shard = {"hidden": h, "targets": y}
            value = tiled(lambda hidden, targets: loss(self, hidden, targets), shard, [self.head.weight], 0, self.loss)
        else:
            value = TiledFusedLogitsLoss.apply(loss, self, h, y, None, self.tiles, [self.head.weight], self.loss)
        return value / (y != -100).sum() if self.loss == "sum" else value


def batch(rank: int, step: int, all_targets: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7 + 10 * rank + step)
    x = torch.randn(1, TOKENS, HIDDEN, generator=generator)
    y = torch.randint(0, VOCABULARY, (1, TOKENS), generator=generator)
    y[:, : 0 if all_targets else 3 * step + 2 * rank] = -100
    return x, y


def gradients(stage: int, steps: int, tiles: int, all_targets: bool = False, **how: Any) -> dict[str, tuple[float, float]]:
    """{parameter: (ratio, error)} of a step of `steps` micro-batches; what the ranks run."""
    import deepspeed

    alone, net = Net(), Net(tiles, **how)
    for rank in range(WORLD):
        for step in range(steps):
            (alone(*batch(rank, step, all_targets)) / (WORLD * steps)).backward()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": steps, "gradient_clipping": 0.0}
    config |= {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000}, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=LR), config=config)
    for step in range(steps):
        engine.backward(engine(*batch(torch.distributed.get_rank(), step, all_targets)))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(net.parameters()), enabled=stage == 3):
        got = {name: (before[name] - p.detach()) / LR for name, p in net.named_parameters()}
    engine.destroy()
    wanted = {name: p.grad for name, p in alone.named_parameters()}
    return {
        name: (float((got[name] * g).sum() / (g * g).sum()), float((got[name] - g).abs().max() / g.abs().max()))
        for name, g in wanted.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="PATTERN", help="ways whose names have it (a regular expression)")
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 1, 2, 3], help="stages (0 1 2 3)")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    parser.add_argument("--markdown", action="store_true", help="tables in markdown on stdout, all else on stderr")
    args = parser.parse_args()
    from deepspeed_tiles import gradients as job  # by a name that the ranks can import

    pool, rows = Pool(WORLD), []
    for way, how in ((way, how) for way, how in WAYS.items() if re.search(args.only, way)):
        for stage, steps in (case for case in CASES if case[0] in args.zero):
            row: dict[str, Any] = {"section": "tiles", "way": way, "zero": stage, "accumulation": steps}
            try:
                found = pool.run(job, stage=stage, steps=steps, **how)[0]
                worst = max(found, key=lambda name: found[name][1])
                row |= {"parameter": worst, "ratio": found[worst][0], "error": found[worst][1]}
            except WorkerError as error:
                row |= {"parameter": f"fails: {error.errors[0][0]}", "ratio": float("nan"), "error": float("nan")}
            rows.append(row)
    pool.close()
    show(rows, Console(stderr=args.markdown), args.markdown)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

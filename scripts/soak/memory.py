"""A long run over rows of all lengths: resident memory and open files of every rank must not grow.

    python scripts/soak/memory.py --json memory.json      # 1,000 steps on four CPU ranks (ulysses 2 x ring 2), about 10 minutes

Every step has another length (100 to 1,000 tokens) and other documents: one, a few, many short ones, a half-row one before short
ones. The means of the last 200 steps are compared with those of steps 200 to 400.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import ranks as jobs

SHORTEST, LONGEST = 100, 1000


def documents(step: int) -> list[int]:
    """Boundaries of the row of one step."""
    chance = random.Random(step)
    tokens = chance.randint(SHORTEST, LONGEST)
    first, count = [(0, 0), (0, chance.randint(1, 4)), (0, tokens // 20), (tokens // 2, 5)][step % 4]
    return sorted({0, tokens, *([first] if first else []), *(chance.randint(first + 1, tokens - 1) for _ in range(count))})


def worker(folder: Path, steps: int) -> None:
    import psutil
    import torch

    import ds_cp
    from ds_cp import selftest

    torch.set_num_threads(1)
    model = selftest.tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = selftest.ds_config(2, {"size": "auto", "ulysses_size": 2, "ring_size": "auto"})
    engine, *_ = ds_cp.initialize(model=model, optimizer=optimizer, config=config)
    here, rank = psutil.Process(), torch.distributed.get_rank()
    with open(folder / f"rank{rank}.jsonl", "w") as out:
        for step in range(steps):
            bounds = documents(step)
            ids = torch.randint(1, 96, (1, bounds[-1]), generator=torch.Generator().manual_seed(step))
            positions = torch.cat([torch.arange(end - start) for start, end in pairwise(bounds)]).unsqueeze(0)
            loss = engine(input_ids=ids, labels=ids.clone(), position_ids=positions).loss
            engine.backward(loss)
            engine.step()
            print(json.dumps([here.memory_info().rss, here.num_fds(), here.num_threads()]), file=out, flush=True)
    selftest.finish(engine)
    torch.distributed.destroy_process_group()


def growth(values: list[int], steps: int) -> tuple[float, float]:
    """Mean of steps 200 to 400 (of 1,000), and by how much that of the last fifth is more."""
    before, after = statistics.mean(values[steps // 5 : 2 * steps // 5]), statistics.mean(values[-steps // 5 :])
    return before, after / before - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--bar", type=float, default=0.02, help="growth that is too much (0.02)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.steps)
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        processes = jobs.start(Path(__file__), ["--worker", folder, "--steps", str(args.steps)], args.ranks, logs)
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit(f"ended with {codes}: {(logs / 'rank0.log').read_text()[-3000:]}")
        seen = [[*map(json.loads, (logs / f"rank{rank}.jsonl").read_text().splitlines())] for rank in range(args.ranks)]
    result = {"steps": args.steps, "ranks": []}
    for rank, lines in enumerate(seen):
        found = {}
        for name, values in zip(("rss", "files", "threads"), zip(*lines, strict=True), strict=True):
            before, grown = growth(values, args.steps)
            found[name] = {"steps_200_to_400": round(before, 1), "growth": round(grown, 4), "every_50th": values[::50]}
            print(f"rank {rank} {name:<8} {before:14.1f}  {grown:+.2%}", flush=True)
        result["ranks"].append(found)
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")
    sys.exit(any(abs(found[name]["growth"]) > args.bar for found in result["ranks"] for name in ("rss", "files")))


if __name__ == "__main__":
    main()

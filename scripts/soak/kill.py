"""A run whose ranks are killed again and again, beside the same run left alone: every loss and every row must be the same.

    python scripts/soak/kill.py --json kill.json     # 200 steps, SIGKILL of a random rank every 20 s of running: about 15 minutes

Four CPU ranks (ulysses 2 x ring 2), ZeRO 2, AdamW, packed rows through ds_cp's loader, which shuffles, `ds_cp.save_checkpoint`
every --save steps. Seconds of running count from a run's first step, once there is a checkpoint. When a rank is killed, the others
must end by themselves; then all start again from the last whole checkpoint. Each rank writes every step's loss and rows; those of
both runs are compared to the bit.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import ranks as jobs

SURVIVORS_S = 120


def worker(folder: Path, steps: int, save: int, length: int) -> None:
    import torch

    import ds_cp
    from ds_cp import selftest
    from ds_cp.models import attach

    class Packed(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            generator = torch.Generator().manual_seed(index)
            ids = torch.randint(1, 96, (length,), generator=generator)
            ids[0] = index
            bounds = [0, *sorted(torch.randint(1, length, (5,), generator=generator).tolist()), length]
            positions = torch.cat([torch.arange(end - start) for start, end in pairwise(bounds)])
            return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions}

    torch.set_num_threads(1)
    model = selftest.tiny_model("llama", num_hidden_layers=4)
    config = selftest.ds_config(2, {"size": "auto", "ulysses_size": 2, "ring_size": "auto", "comm_timeout_s": 60}, accumulation=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, _, loader, _ = ds_cp.initialize(model=model, optimizer=optimizer, config=config, training_data=Packed())
    if (folder / "latest").exists():
        _, state = engine.load_checkpoint(str(folder))
        loader.load_state_dict(state["loader"])
    rank = torch.distributed.get_rank()
    out = open(folder / f"rank{rank}.jsonl", "a")  # noqa: SIM115  (open until the process is killed)
    losses, rows = [], []
    while engine.global_steps < steps:
        for batch in loader:
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            losses.append(float(loss.detach()).hex())
            rows.append(int(batch["input_ids"][0, 0]))
            if len(losses) == 2:
                print(json.dumps({"step": engine.global_steps, "losses": losses, "rows": rows}), file=out, flush=True)
                losses, rows = [], []
                if engine.global_steps % save == 0:
                    ds_cp.save_checkpoint(engine, folder, client_state={"loader": loader.state_dict()})
                if engine.global_steps == steps:
                    break
    attach.handle_of(engine).watch.end()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def lines(folder: Path, rank: int) -> list[dict[str, Any]]:
    """A last line that a kill cut off is left out: its step comes again."""
    path = folder / f"rank{rank}.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1] if line.endswith("}")]


def run(folder: Path, job: list[str], ranks: int, every_s: float, most: int | None = None) -> list[dict[str, Any]]:
    """Until it ends with success, after `most` kills if that is given; what was killed, and what came of it."""
    chance, kills = random.Random(0), []
    for _ in range(100):
        before = len(lines(folder, 0))
        processes = jobs.start(Path(__file__), ["--worker", str(folder), *job], ranks, folder)
        begun = None
        while all(process.poll() is None for process in processes):
            time.sleep(0.1)
            if begun is None and len(lines(folder, 0)) > before and (folder / "latest").exists():
                begun = time.monotonic()
            if len(kills) == most or begun is None or time.monotonic() - begun < every_s:
                continue
            kills.append(kill(processes, chance.randrange(ranks), folder))
            break
        else:
            for process in processes:
                process.wait(SURVIVORS_S)
            if any(process.returncode for process in processes):
                sys.exit(f"ended by itself with {[p.returncode for p in processes]}: {(folder / 'rank0.log').read_text()[-3000:]}")
            return kills
    sys.exit("no end after 100 kills")


def kill(processes: list[Any], rank: int, folder: Path) -> dict[str, Any]:
    step, latest = len(lines(folder, 0)) and lines(folder, 0)[-1]["step"], folder / "latest"
    processes[rank].kill()
    start = time.monotonic()
    for process in processes:
        try:
            process.wait(max(SURVIVORS_S - (time.monotonic() - start), 0.1))
        except jobs.subprocess.TimeoutExpired:
            jobs.end(processes)
            sys.exit(f"a survivor did not end in {SURVIVORS_S} s after rank {rank} was killed in step {step + 1}")
    found = {"rank": rank, "after_step": step, "seconds_to_end": round(time.monotonic() - start, 1)}
    found["goes_on_from"] = latest.read_text() if latest.exists() else "the start"
    print(found, flush=True)
    return found


def differences(alone: Path, killed: Path, ranks: int) -> tuple[int, list[str]]:
    """Lines compared, and those of the killed run that the other does not have to the bit."""
    compared, found = 0, []
    for rank in range(ranks):
        wanted = {line["step"]: line for line in lines(alone, rank)}
        own = lines(killed, rank)
        compared += len(own)
        found += [f"rank {rank}: {line} not {wanted.get(line['step'])}" for line in own if line != wanted.get(line["step"])]
        if {line["step"] for line in own} != set(wanted):
            found.append(f"rank {rank}: steps are missing")
    return compared, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--every", type=float, default=20.0, help="seconds of running before a kill (20)")
    parser.add_argument("--kills", type=int, help="after so many it is left alone (none)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a row (1024)")
    parser.add_argument("--save", type=int, default=10, help="steps between checkpoints (10)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.steps, args.save, args.length)
    job = ["--steps", str(args.steps), "--save", str(args.save), "--length", str(args.length)]
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder, "alone"), Path(folder, "killed")
        alone.mkdir()
        killed.mkdir()
        start = time.monotonic()
        kills = run(killed, job, args.ranks, args.every, args.kills)
        seconds = round(time.monotonic() - start)
        run(alone, job, args.ranks, args.every, most=0)
        compared, found = differences(alone, killed, args.ranks)
    result = {"steps": args.steps, "ranks": args.ranks, "seconds": seconds, "kills": kills, "lines_compared": compared}
    print(f"{len(kills)} kills, {compared} steps of ranks compared, {len(found)} differ", *found[:5], sep="\n")
    if args.json:
        args.json.write_text(json.dumps({**result, "different": found}, indent=1) + "\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()

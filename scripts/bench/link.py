"""One training step over two hosts whose link is shaped: where the all-to-all and the ring cross it.

    sudo .venv/bin/python scripts/bench/link.py --rates none 1gbit 100mbit --json link.json     # 10 minutes
    sudo .venv/bin/python scripts/bench/link.py --rates 100mbit --kv-heads 2 --contenders ALST "ulysses 2 x ring 2, kept"

Two hosts of two gloo ranks each, made by scripts/hosts on this machine (root), one row over all four ranks,
the model and the steps of scripts/bench/alst.py: ALST, ds_cp with Ulysses over all ranks, with Ulysses inside a host and the ring
across (with `ring_keep` too), and with a ring alone. Every contender starts afresh; seconds are those of the slower rank, the
median after one step to warm up; "sent" is what the host that sends most put on its link in a step, everything included (ZeRO
3's too), as its interface counts it. A rate is tc's (tbf), none leaves the link as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import alst
import torch

TOOL = Path(__file__).resolve().parents[1] / "hosts"
NAME = f"link{os.getpid()}"
HOSTS, SLOTS = 2, 2
SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")
CONTENDERS: dict[str, dict[str, Any]] = {
    alst.ALST: {},
    "ulysses 4": {"ulysses_size": 4, "ring_size": 1},
    "ulysses 2 x ring 2": {"ulysses_size": 2, "ring_size": 2},
    "ulysses 2 x ring 2, kept": {"ulysses_size": 2, "ring_size": 2, "ring_keep": True},
    "ring 4": {"ulysses_size": 1, "ring_size": 4},
}


def tool(*arguments: str) -> str:
    return subprocess.run([TOOL, "--name", NAME, *arguments], check=True, capture_output=True, text=True).stdout


def worker(spec_path: Path) -> None:
    import deepspeed

    spec = json.loads(spec_path.read_text())
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    case, sizes = alst.Case(**spec["case"]), CONTENDERS[spec["contender"]]
    model = alst.make_model(case)
    build = alst.build_ours if sizes else alst.build_alst
    step = build(model, torch.optim.SGD(model.parameters(), lr=1e-4), case, **sizes)
    seconds, sent = [], []
    for _ in range(case.steps + 1):
        torch.distributed.barrier()
        before, start = int(SENT.read_text()), time.perf_counter()
        step()
        torch.distributed.barrier()
        seconds.append(time.perf_counter() - start)
        sent.append(int(SENT.read_text()) - before)
    spec_path.with_name(f"rank{os.environ['RANK']}.json").write_text(json.dumps({"seconds": seconds[1:], "sent": sent[1:]}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run(contender: str, case: alst.Case) -> list[dict[str, Any]]:
    """What each rank wrote."""
    with tempfile.TemporaryDirectory() as folder:
        spec, ranks = Path(folder, "spec.json"), []
        spec.write_text(json.dumps({"contender": contender, "case": asdict(case)}))
        shared = alst.environment() | {"WORLD_SIZE": str(HOSTS * SLOTS), "MASTER_ADDR": "host1", "MASTER_PORT": "29517"}
        for rank in range(HOSTS * SLOTS):
            host = f"host{rank // SLOTS + 1}"
            command = [TOOL, "--name", NAME, "run", "--on", host, sys.executable, __file__, "--worker", spec]
            env = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank % SLOTS)}
            with open(Path(folder, f"log{rank}"), "wb") as log:
                ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
        codes = [process.wait(timeout=600) for process in ranks]
        if any(codes):
            rank = next(rank for rank, code in enumerate(codes) if code)
            sys.exit(f"{contender}, rank {rank}:\n{Path(folder, f'log{rank}').read_text()[-3000:]}")
        return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(HOSTS * SLOTS)]


def measure(rate: str, contender: str, case: alst.Case) -> dict[str, Any]:
    found = run(contender, case)
    seconds = [max(steps) for steps in zip(*(rank["seconds"] for rank in found), strict=True)]
    sent = [max(steps) for steps in zip(*(rank["sent"] for rank in found), strict=True)]
    return {
        "rate": rate,
        "contender": contender,
        "kv_heads": case.shape["num_key_value_heads"],
        "seconds": statistics.median(seconds),
        "sent_mb": statistics.median(sent) / 1e6,
        "all_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rates", nargs="+", default=["none", "1gbit", "100mbit"])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--kv-heads", type=int, default=4, help="of 8 query heads (4)")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    about, rows = alst.machine(), []
    case = alst.Case("speed", documents=(args.length,), steps=args.steps, kv_heads=args.kv_heads)
    subprocess.run([sys.executable, "-c", alst.PREBUILD], env=alst.environment(), check=True, timeout=900, stdout=sys.stderr)
    tool("up", "--hosts", str(HOSTS), "--slots", str(SLOTS))
    try:
        for rate in args.rates:
            tool("shape", "--rate", rate)
            for contender in args.contenders:
                row = measure(rate, contender, case)
                rows.append(row)
                print(f"{rate:>8}  {contender:<20} {row['seconds']:7.2f} s  {row['sent_mb']:7.1f} MB", flush=True)
    finally:
        tool("down")
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "tokens": args.length, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]))
    else:
        main()

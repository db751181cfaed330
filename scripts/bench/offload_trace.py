"""`activation_offload` in a step's trace: how much of the copies to and from the host is behind computation.

    python scripts/bench/offload_trace.py --json docs/data/h200_offload_trace.json --png docs/h200_offload_trace.png
    DS_ACCELERATOR=cpu python scripts/bench/offload_trace.py --tiny     # proves the script where there is no GPU: no copies to see

Rank 7 of 8 under PyTorch's fake process group, as in one_rank.py: Llama-8B shapes, ZeRO 3, every layer checkpointed. With and
without `activation_offload`, the median of --steps and one more under torch.profiler.

    to_host_mib      what a step sends to the host: layer inputs, and what else is kept in their shape
    copies_ms        time in which a copy to or from the host runs; covered: the share of it in which a kernel runs too
    exposed_ms       what the profiled step waits: copies with no kernel beside them
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import one_rank
import torch
from alst import machine, show
from one_rank import Case
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

Span = tuple[float, float]


def worker(case: Case) -> None:
    timeline = one_rank.become_rank(case)
    step, sent = one_rank.build(case, timeline), counted()
    for _ in range(one_rank.WARM_UP):
        step()
    sent.clear()
    marks = [timeline.now()]
    for _ in range(case.steps):
        step()
        marks.append(timeline.now())
    row = {"seconds": statistics.median(timeline.seconds(marks)), "to_host_mib": sum(sent) / case.steps / 2**20}
    row |= traced(step) if timeline.cuda else {}
    print("", one_rank.RESULT + json.dumps(row), sep="\n", flush=True)


def counted() -> list[int]:
    """Bytes of each tensor that is sent to the host from now on."""
    from ds_cp.offload import Offload

    send, sent = Offload._send, []

    def _send(self: Offload, x: torch.Tensor) -> Any:
        sent.append(x.nbytes)
        return send(self, x)

    Offload._send = _send
    return sent


def traced(step: Any) -> dict[str, Any]:
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    zero = min(e.time_range.start for e in events)
    spans: dict[str, list[Span]] = {"to host": [], "from host": [], "kernels": []}
    for e in events:
        kind = {"DtoH": "to host", "HtoD": "from host"}.get(e.name.removeprefix("Memcpy ")[:4], "kernels")
        if kind != "kernels" or not e.name.startswith(("Memcpy", "Memset")):
            spans[kind].append(((e.time_range.start - zero) / 1e3, (e.time_range.end - zero) / 1e3))
    merged = {kind: union(each) for kind, each in spans.items()}
    copies = union(merged["to host"] + merged["from host"])
    length, hidden = total(copies), total(common(copies, merged["kernels"]))
    return {"copies_ms": length, "covered": hidden / length if length else None, "exposed_ms": length - hidden, "spans_ms": merged}


def union(spans: list[Span]) -> list[Span]:
    out: list[Span] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = out[-1][0], max(end, out[-1][1])
        else:
            out.append((start, end))
    return out


def common(a: list[Span], b: list[Span]) -> list[Span]:
    return [(max(x, u), min(y, v)) for x, y in a for u, v in b if max(x, u) < min(y, v)]


def total(spans: list[Span]) -> float:
    return sum(end - start for start, end in spans)


def draw(rows: list[dict[str, Any]], png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    (row,) = (r for r in rows if r["activation_offload"])
    figure, axis = pyplot.subplots(figsize=(11, 2.4))
    for place, kind in enumerate(("kernels", "from host", "to host")):
        spans = [(start, max(end - start, 0.3)) for start, end in row["spans_ms"][kind]]
        axis.broken_barh(spans, (place - 0.35, 0.7))
    axis.set(yticks=range(3), yticklabels=("kernels", "host to device", "device to host"), xlabel="ms of the step")
    figure.tight_layout()
    figure.savefig(png, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--local-tokens", type=int, default=32768)
    add("--layers", type=int, default=4)
    add("--steps", type=int, default=3)
    add("--tiny", action="store_true", help="a tiny model: proves the script")
    add("--json", type=Path, help="write the rows and the machine here")
    add("--png", type=Path, help="draw the trace")
    args = parser.parse_args()
    rows = []
    for offload in (False, True):
        case = Case(
            contender="ds_cp",
            attention="auto",
            ulysses=8,
            ring=1,
            world=8,
            rank=7,
            local_tokens=64 if args.tiny else args.local_tokens,
            layers=args.layers,
            checkpointing=True,
            steps=args.steps,
            tiny=args.tiny,
            block={"activation_offload": offload},
        )
        env = {"RANK": "7", "LOCAL_RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, __file__, "--worker", json.dumps(asdict(case))]
        out = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
        found = [line for line in out.stdout.splitlines() if line.startswith(one_rank.RESULT)]
        if not found:
            sys.exit(out.stdout[-2000:] + out.stderr[-3000:])
        about = {"activation_offload": offload, "local_tokens": case.local_tokens, "layers": case.layers}
        rows.append(about | json.loads(found[-1].removeprefix(one_rank.RESULT)))
    show([{"section": "offload"} | {k: v for k, v in row.items() if k != "spans_ms"} for row in rows], Console(), False)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": rows}) + "\n")
    if args.png and any(row.get("copies_ms") for row in rows):
        draw(rows, args.png)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Case(**json.loads(sys.argv[2])))
        sys.stdout.flush()
        os._exit(0)
    else:
        main()

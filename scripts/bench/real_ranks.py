"""Real GPUs, a rank each, over NCCL: whole training steps beside DeepSpeed's own ALST, and the ring beside one kernel.

    python scripts/bench/real_ranks.py --json real_ranks.json          # as many ranks as there are GPUs
    python scripts/bench/real_ranks.py --sections ring --lengths 32768 131072
    DS_ACCELERATOR=cpu python scripts/bench/real_ranks.py --tiny       # proves the script where there is no GPU: gloo

step   ds_cp.initialize as a user calls it, ZeRO 3, bf16, torch's AdamW, every layer checkpointed, Llama-8B shapes, one row of
       ranks * local tokens: median seconds between the ends of steps on the slowest rank; peak_gib of the rank that has most
ring   RingAttention forward and backward over the real ring, one document, zigzag, 32/8 heads of 128: median milliseconds of
       the slowest rank; "efficiency" is that of the same kernel on the whole row on one GPU / ranks / this. "compute" is the
       same rank with its hops replaced by copies on the GPU, so the rest is what the network adds; hop_ms is a hop of k and v by
       itself, host_ms how long the host takes to launch it all

Each case is a process of its own on every rank.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a plain checkout needs no installation

from alst import machine, show
from one_rank import GIB, LLAMA_8B, RESULT, TINY, Case, Timeline, build_alst, make_model, make_row, stepping
from rich.console import Console

Row = dict[str, Any]
HEADS, SIZE = (32, 8), 128
WARM_UP = 4


def step(job: dict[str, Any], device: str) -> Row:
    """Seconds of whole steps of this rank, and its peak."""
    case = Case(**job["case"], world=dist.get_world_size(), rank=dist.get_rank(), checkpointing=True)
    timeline = Timeline(cuda=device == "cuda")
    row = make_row(case.world * case.local_tokens, (TINY if case.tiny else LLAMA_8B)[2])
    torch.manual_seed(0)  # contenders begin alike, so their losses can be compared
    model = make_model(case, case.world * case.local_tokens)
    engine, forward = build_alst(model, case, timeline) if case.contender == "ALST" else build_ours(model, case)
    run = stepping(model, engine, forward, timeline)
    losses = [float(run(row)) for _ in range(WARM_UP)]
    if timeline.cuda:
        torch.cuda.reset_peak_memory_stats()
    moments = [timeline.now()]
    for _ in range(case.steps):
        run(row)
        moments.append(timeline.now())
    seconds = timeline.seconds(moments)
    peak = torch.cuda.max_memory_allocated() / GIB if timeline.cuda else 0.0
    return {"seconds": statistics.median(seconds), "fastest": min(seconds), "peak_gib": peak, "loss": losses[-1]}


def build_ours(model: Any, case: Case) -> tuple[Any, Any]:
    import ds_cp

    optimizer = {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
    config |= {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "optimizer": optimizer, "steps_per_print": 10**9}
    sizes = {"size": case.world, "ulysses_size": case.ulysses, "ring_size": case.ring}
    config |= {"sequence_parallel": {**case.block, **sizes, "attention_kernel": case.attention}}
    engine = ds_cp.initialize(model=model, model_parameters=model.parameters(), config=config)[0]
    return engine, lambda row: engine(**row).loss


def ring(job: dict[str, Any], device: str) -> list[Row]:
    """For every length milliseconds of the ring on this rank, and of the monolithic kernel on rank 0."""
    from ring_rank import resolve

    from ds_cp import mesh
    from ds_cp.topology import Topology

    args = SimpleNamespace(device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32, **job["args"])
    real = mesh.build(Topology(ulysses=1, ring=dist.get_world_size(), data=1), timeout_s=300).ring
    place = SimpleNamespace(group=real.group, ranks=real.ranks, rank=real.rank, size=real.size, waits=None)
    kernel = resolve(job["kernel"], args)
    rows = [over_the_wire(args, kernel, place, length, job) for length in job["lengths"]]
    from_here = [without_a_wire(args, kernel, place, length, job["impl"]) for length in job["lengths"]]  # replaces comm's hops
    return [row | more for row, more in zip(rows, from_here, strict=True)]


def over_the_wire(args: Any, kernel: Any, place: Any, length: int, job: dict[str, Any]) -> Row:
    from ring_rank import inputs, measure, ours, ring_context

    args.lanes = False
    context = ring_context(args, kernel, (0, length), place, job["impl"])
    context.methods.beside = torch.cuda.Stream() if args.device == "cuda" else None
    tensors = inputs(args, length // place.size, HEADS, SIZE)
    forward, backward = ours(context, tensors)
    for _ in range(3):  # kernels are compiled, NCCL connects
        backward(forward())
    dist.barrier()
    out = {"ring": kept(measure(args, forward, backward, kernel)), "hop_ms": hop_ms(args, place, tensors[2])}
    start = time.perf_counter()
    backward(forward())
    out["host_ms"] = (time.perf_counter() - start) * 1000  # until everything is launched
    if job["trace"] and args.device == "cuda":
        torch.cuda.synchronize()
        dist.barrier()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            backward(forward())
            torch.cuda.synchronize()
        events = [
            (e.time_range.start, e.time_range.elapsed_us(), e.name[:60]) for e in profile.events() if e.device_type.name == "CUDA"
        ]
        first = min(start for start, *_ in events)
        out["trace"] = sorted([round(start - first), round(elapsed), name] for start, elapsed, name in events if elapsed > 5)
    dist.barrier()
    return out


def hop_ms(args: Any, place: Any, kv: torch.Tensor) -> float:
    """A hop of k and v alone, nothing else on the GPU."""
    from ring_rank import milliseconds, now, synchronized

    from ds_cp import comm

    buffers = torch.stack([kv, kv]), torch.stack([kv, kv])
    after, before = (place.rank + 1) % place.size, (place.rank - 1) % place.size
    samples = []
    for _ in range(8):
        dist.barrier()
        start = now(args.device)
        comm.Hop([(buffers[0], after)], [(buffers[1], before)], place, "test").wait()
        end = now(args.device)
        synchronized(args.device)
        samples.append(milliseconds(start, end))
    return statistics.median(samples)


def without_a_wire(args: Any, kernel: Any, place: Any, length: int, impl: str) -> Row:
    """The same with copies for hops, and one kernel on the whole row, on rank 0."""
    import ring_wire
    from ring_rank import alone, axis, causal, inputs, measure, ours, ring_context

    out: Row = {}
    args.lanes = True
    if args.device == "cuda":
        ring_wire.install()
        fake = axis(ring_wire.Wire(args.device), place.size, place.rank)
        tensors = inputs(args, length // place.size, HEADS, SIZE)
        out["compute"] = kept(measure(args, *ours(ring_context(args, kernel, (0, length), fake, impl), tensors), kernel))
    dist.barrier()
    if dist.get_rank() == 0:
        tile = causal(args, (0, length))
        out["alone"] = kept(measure(args, *alone(kernel, tile, inputs(args, length, HEADS, SIZE)), kernel))
    dist.barrier()
    return out


def kept(row: Row) -> Row:
    return {key: row[key] for key in ("forward_ms", "backward_ms", "total_ms", "extra_mib")}


def worker(section: str, job: dict[str, Any]) -> None:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator().device_name()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(verbose=False)
    try:
        mine = {"outcome": "ok"} | (step(job, device) if section == "step" else {"rows": ring(job, device)})
    except torch.OutOfMemoryError as error:
        mine = {"outcome": "out of memory", "message": str(error).split("\n")[0]}
    everyone: list[Any] = [None] * dist.get_world_size()
    if mine["outcome"] == "ok":
        dist.all_gather_object(everyone, mine)
    if dist.get_rank() == 0:
        name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
        print("", RESULT + json.dumps({"device": name, "ranks": everyone}), sep="\n", flush=True)
    os._exit(0)  # what matters is printed; one that ran out of memory has left the others in a collective


def run(section: str, job: dict[str, Any], ranks: int, timeout: float, console: Console) -> list[Row] | None:
    """What every rank measured; None if it failed, which is said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, "-X", "faulthandler", __file__, "--worker", section, json.dumps(job)]
    merged: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    ids = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)} for rank in range(ranks)]
    started = [subprocess.Popen(command, env=os.environ | shared | mine, **merged) for mine in ids]
    try:
        text = started[0].communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        started[0].kill()
        text = started[0].communicate()[0] + f"\nnot done after {timeout:.0f} s"
    for each in started[1:]:
        each.kill()
        other = each.communicate()[0]
        text = text if RESULT in text else text + other[-2000:]
    found = [json.loads(line.removeprefix(RESULT)) for line in text.splitlines() if line.startswith(RESULT)]
    if not found or None in found[0]["ranks"]:
        console.print(text[-3000:], markup=False)
        return None
    return [row | {"device": found[0]["device"]} for row in found[0]["ranks"]]


def steps(args: argparse.Namespace, console: Console, keep: Callable[[Row], None]) -> None:
    contenders = [("ALST", core, (args.ranks, 1), {}) for core in args.alst]
    contenders += [("ds_cp", args.kernel, sizes, args.block) for sizes in args.settings]
    for local_tokens in args.local_tokens:
        alst = None
        for contender, attention, (ulysses, degree), block in contenders:
            case = {"contender": contender, "attention": attention, "ulysses": ulysses, "ring": degree, "block": block}
            case |= {"local_tokens": local_tokens, "layers": args.layers, "steps": args.steps, "tiny": args.tiny}
            found = run("step", {"case": case}, args.ranks, args.timeout, console)
            row = {"section": "step", **{key: case[key] for key in ("contender", "attention", "ulysses", "ring", "local_tokens")}}
            if found is not None:
                row |= {key: max(each[key] for each in found) for key in ("seconds", "fastest", "peak_gib")}
                alst = row["seconds"] if contender == "ALST" else alst
                row |= {"to_alst": row["seconds"] / alst if alst else None, "loss": found[0]["loss"], "device": found[0]["device"]}
            keep(row)


def rings(args: argparse.Namespace, console: Console, keep: Callable[[Row], None]) -> None:
    timing = {"seconds": args.seconds, "calls": 100}
    for kernel, impl in itertools.product(args.ring_kernels, args.impl):
        job = {
            "lengths": args.lengths,
            "kernel": kernel,
            "impl": impl,
            "args": timing,
            "trace": args.trace,
        }
        found = run("ring", job, args.ranks, args.timeout, console)
        for index, length in enumerate(args.lengths):
            row = {"section": "ring", "length": length, "kernel": kernel, "impl": impl}
            if found is not None:
                ranks = [each["rows"][index] for each in found]
                slowest = max(each["ring"]["total_ms"] for each in ranks)
                row |= {"ring_ms": slowest, "alone_ms": ranks[0]["alone"]["total_ms"], "device": found[0]["device"]}
                row |= {"efficiency": row["alone_ms"] / args.ranks / slowest}
                row |= {"compute_ms": max(each.get("compute", {}).get("total_ms", 0.0) for each in ranks)}
                row |= {key: max(each[key] for each in ranks) for key in ("hop_ms", "host_ms")}
                row |= {"extra_mib": max(each["ring"]["extra_mib"] or 0.0 for each in ranks), "ranks": ranks}
            keep(row)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sections", nargs="+", choices=["step", "ring"], default=["ring", "step"])
    add("--ranks", type=int, default=torch.cuda.device_count() or 2, help="(all GPUs)")
    add("--local-tokens", type=int, nargs="+", default=[16384, 32768], help="step: tokens a rank (16384 32768)")
    add("--layers", type=int, default=4, help="step (4)")
    add("--kernel", default="auto", help="step: ds_cp's attention_kernel (auto)")
    add("--block", type=json.loads, default={}, help="step: more of ds_cp's block, as JSON")
    add("--alst", nargs="*", default=["sdpa"], help="step: ALST's core attentions (sdpa)")
    add("--settings", nargs="*", help="step: ds_cp, ulysses x ring (all ranks to the one, all to the other)")
    add("--steps", type=int, default=5, help="step: timed steps (5)")
    add("--lengths", type=int, nargs="+", default=[8192, 32768, 131072], help="ring: tokens of the row")
    add("--ring-kernels", nargs="+", default=["auto"], help="ring: attention_kernel (auto)")
    add("--impl", nargs="+", default=["p2p", "allgather"], help="ring: ring_impl (p2p allgather)")
    add("--trace", action="store_true", help="ring: keep every kernel's start and duration in the JSON")
    add("--seconds", type=float, default=1.0, help="ring: of timed calls (1)")
    add("--tiny", action="store_true", help="a tiny model and short rows: proves the script")
    add("--timeout", type=float, default=240, help="seconds that a case may take (240)")
    add("--json", type=Path)
    args = parser.parse_args()
    settings = [f"{args.ranks}x1", f"1x{args.ranks}"] if args.settings is None else args.settings
    args.settings = [tuple(map(int, setting.split("x"))) for setting in settings]
    if any(len(sizes) != 2 or math.prod(sizes) != args.ranks for sizes in args.settings):
        parser.error(f"--settings must be ulysses x ring = {args.ranks}, got {' '.join(settings)}")
    if args.tiny:
        args.local_tokens, args.lengths, args.seconds = [64], [256], 0.05
    return args


def main() -> None:
    args, console = parse(), Console()
    about, rows = machine(), []

    def keep(row: Row) -> None:
        rows.append(row)
        console.print({key: value for key, value in row.items() if key != "ranks"})
        if args.json:
            args.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")

    for section in args.sections:
        {"step": steps, "ring": rings}[section](args, console, keep)
    for section in args.sections:
        show([row for row in rows if row["section"] == section], console, True)
    sys.exit(int(any("device" not in row for row in rows)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()

"""ds_cp, DeepSpeed's own ALST and one Hugging Face process on the same model and the same rows, on CPU.

    python scripts/bench/alst.py --json alst.json       # everything: some 25 minutes on 2 cores
    python scripts/bench/alst.py --quick                # three minutes
    python scripts/bench/alst.py --only speed --lengths 4096 --markdown

Every contender answers four questions (two gloo ranks of one thread each, fp32, sequence parallel size 2):
    gradient      how large is the applied gradient, against one process, at each ZeRO stage?
    packed        do the documents of a packed row (position_ids that reset) stay apart?
    accumulation  do two accumulated rows with unequal target counts give the token-weighted gradient?
    speed         seconds a step and peak resident memory
One process is transformers' own model, sdpa attention and loss (summed, divided by all targets of the step), without
DeepSpeed. ALST is used as DeepSpeed's tutorial uses it: mpu, loader adapter, weighted loss.

The applied gradient is (w_before - w_after) / lr after one step of SGD, unclipped. lr is 2**20: rounding of the weights
to fp32 is then a millionth of what it is at lr 1, and the division is exact. Three numbers compare it with one process:
    ratio     least-squares scale of all gradients (1 is right)
    error     max|g - g_one| / max|g_one| of the worst parameter, no scale removed (0 is right)
    error_l2  |g - g_one| / |g_one| over all parameters

Speed: contenders take turns, each turn in fresh processes with one step to warm up; the median is over all turns. A
step lasts from asking for the row (ALST shards it in its loader, ds_cp in the forward) to the end of the update, on the
slower rank. Memory is the kernel's high-water mark of the resident set (VmHWM, reset before the first step) minus the
resident set at the reset, when model and engine exist: the larger rank, the largest turn. ZeRO 3, as in the tutorial.

Imports: the ranks alone import transformers, deepspeed and ds_cp, where they use them; the parent needs torch and rich.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

SP = 2
IGNORE = -100
LEARNING_RATE = 2.0**20
ONE, ALST = "one process", "ALST"
OURS = {"ds_cp ulysses=2": {"ulysses_size": 2, "ring_size": 1}, "ds_cp ring=2": {"ulysses_size": 1, "ring_size": 2}}
SECTIONS = ("gradient", "packed", "accumulation", "speed")
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128, **HEADS}
LARGE = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "vocab_size": 1024, **HEADS}
PREBUILD = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"

Tensors = dict[str, torch.Tensor]
Step = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """One job for a contender: plain values, so that it travels to the ranks as JSON."""

    section: str
    stage: int = 3
    reduce_scatter: bool = True
    documents: tuple[int, ...] = (256,)
    """Lengths of the documents of each row."""
    strides: tuple[int, ...] = (1,)
    """One row of the accumulated step for each entry: every n-th token of that row is a target."""
    steps: int = 0
    """Timed steps after the one to warm up; 0 takes one step and returns its gradient."""
    vocabulary: int = 0
    """0: that of the shape."""
    kv_heads: int = 0
    """0: those of the shape."""

    @property
    def shape(self) -> dict[str, int]:
        own = {"vocab_size": self.vocabulary, "num_key_value_heads": self.kv_heads}
        return (LARGE if self.steps else SMALL) | {key: value for key, value in own.items() if value}

    @property
    def zero(self) -> str:
        return f"ZeRO {self.stage}" + ("" if self.reduce_scatter else ", reduce_scatter false")


# What a rank runs. Each build function returns one that takes one optimizer step.


def make_rows(case: Case) -> tuple[list[Tensors], int]:
    """The rows of one step and the number of their targets. No target crosses a document: attention alone can."""
    generator = torch.Generator().manual_seed(7)
    positions = torch.cat([torch.arange(n) for n in case.documents])
    rows: list[Tensors] = []
    for stride in case.strides:
        ids = torch.randint(0, case.shape["vocab_size"], (1, len(positions)), generator=generator)
        labels = ids.masked_fill((positions == 0) | (torch.arange(len(positions)) % stride != 0), IGNORE)
        rows.append({"input_ids": ids, "labels": labels, "position_ids": positions[None]})
    return rows, sum(int((row["labels"] != IGNORE).sum()) for row in rows)


def make_model(case: Case) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # With a cache, transformers does not look for documents in position_ids.
    model = LlamaForCausalLM(LlamaConfig(**case.shape, use_cache=False)).train()
    assert model.config._attn_implementation == "sdpa", model.config._attn_implementation
    return model


def deepspeed_config(case: Case) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": len(case.strides),
        "gradient_clipping": 0.0,  # the default of 1.0 hides a wrong scale
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": case.stage, "reduce_scatter": case.reduce_scatter},
        "steps_per_print": 10**9,
    }


def build_one_process(model: torch.nn.Module, optimizer: torch.optim.Optimizer, case: Case) -> Step:
    rows, targets = make_rows(case)

    def step() -> None:
        for row in rows:
            model(**row, num_items_in_batch=torch.tensor(targets)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_alst(model: torch.nn.Module, optimizer: torch.optim.Optimizer, case: Case) -> Step:
    import deepspeed
    import torch.distributed.nn.functional as differentiable
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as mpu
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF, UlyssesSPDataLoaderAdapter

    size = torch.distributed.get_world_size()
    if mpu._SEQUENCE_PARALLEL_GROUP is None:  # a second registration in a process would wrap the first
        UlyssesSPAttentionHF.register_with_transformers(
            model, core_attn_implementation="sdpa", sequence_parallel_size=size, micro_batch_size=1
        )
    config = deepspeed_config(case) | {"sequence_parallel_size": size}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)
    group, rank = mpu.get_sequence_parallel_group(), mpu.get_sequence_parallel_rank()
    # The adapter makes `size` micro-batches of one draw: the row that rank 0 drew, then the row that rank 1 drew.
    drawn = (make_rows(case)[0] * (size * (case.steps + 1)))[rank::size]
    plain = torch.utils.data.DataLoader(drawn, batch_size=None)
    loader = UlyssesSPDataLoaderAdapter(plain, rank, group, size, engine.device)

    def step() -> None:
        for _ in case.strides:
            batch = next(loader)
            labels = batch["shift_labels"]
            loss = model.loss_function(engine(**batch).logits, None, model.config.vocab_size, shift_labels=labels)
            losses = differentiable.all_gather(loss, group=group)
            counts = differentiable.all_gather((labels != IGNORE).sum(), group=group)
            total = sum(part * count for part, count in zip(losses, counts, strict=True))
            engine.backward(total / max(sum(counts), 1))
            engine.step()

    return step


def build_ours(model: torch.nn.Module, optimizer: torch.optim.Optimizer, case: Case, **sizes: Any) -> Step:
    import ds_cp

    config = deepspeed_config(case) | {"sequence_parallel": {"size": torch.distributed.get_world_size(), **sizes}}
    engine, *_ = ds_cp.initialize(model=model, optimizer=optimizer, config=config)
    rows, targets = make_rows(case)
    # Without a count the loss is the mean of its own row: right for one row, not for two unequal ones.
    count = {"num_items_in_batch": targets} if len(rows) > 1 else {}

    def step() -> None:
        for row in rows:
            engine.backward(engine(**row, **count).loss)
            engine.step()

    return step


def time_steps(step: Step, steps: int) -> dict[str, Any]:
    seconds: list[float] = []
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present resident set
    base = status_mib("VmRSS")
    for _ in range(steps + 1):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1:], "memory": status_mib("VmHWM") - base}


def status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def run_case(contender: str, case: Case) -> dict[str, Any]:
    """{"seconds", "memory"} of case.steps steps, or {"gradients"} of one."""
    import deepspeed

    model = make_model(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4 if case.steps else LEARNING_RATE)
    before = {} if case.steps else {name: w.detach().clone() for name, w in model.named_parameters()}
    build = build_one_process if contender == ONE else build_alst if contender == ALST else build_ours
    step = build(model, optimizer, case, **OURS.get(contender, {}))
    if case.steps:
        return time_steps(step, case.steps)
    step()
    sharded = contender != ONE and case.stage == 3
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=sharded):
        after = {name: w.detach().clone() for name, w in model.named_parameters()}
    return {"gradients": {name: (w - after[name]) / LEARNING_RATE for name, w in before.items()}}


def worker(spec_path: Path) -> None:
    import deepspeed

    spec = json.loads(spec_path.read_text())
    torch.set_num_threads(1)
    if spec["contender"] != ONE:
        deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=spec["timeout"]))
    results = [run_case(spec["contender"], Case(**case)) for case in spec["cases"]]
    torch.save(results, spec_path.with_name(f"rank{os.environ['RANK']}.pt"))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


# What the parent runs: start the ranks, compare, print.


def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])  # a plain checkout needs no installation
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def launch(contender: str, cases: list[Case], timeout: float) -> list[list[dict[str, Any]]]:
    """Run the cases on fresh ranks: results[rank][case]. A rank that fails or outlives the timeout fails the run."""
    world = 1 if contender == ONE else SP
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        probe.close()
        spec, logs = Path(folder, "spec.json"), [Path(folder, f"log{rank}") for rank in range(world)]
        spec.write_text(json.dumps({"contender": contender, "cases": [*map(asdict, cases)], "timeout": timeout}))
        command = [sys.executable, "-X", "faulthandler", __file__, "--worker", str(spec)]
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank, log in enumerate(logs):
                env = environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with log.open("wb") as output:
                    ranks.append(subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT))
            wait(contender, ranks, logs, timeout)
        finally:
            for process in ranks:
                process.kill()  # does nothing to one that has ended
                process.wait(timeout=30)
        return [torch.load(Path(folder, f"rank{rank}.pt"), weights_only=True) for rank in range(world)]


def wait(contender: str, ranks: list[subprocess.Popen[bytes]], logs: list[Path], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while (codes := [process.poll() for process in ranks]) != [0] * len(ranks):
        rank = next((rank for rank, code in enumerate(codes) if code), None)
        if rank is not None or time.monotonic() > deadline:
            reason = f"still running after {timeout:.0f} s" if rank is None else f"exit code {codes[rank]}"
            rank = codes.index(None) if rank is None else rank
            tail = "\n".join(logs[rank].read_text(errors="replace").splitlines()[-30:])
            sys.exit(f"{contender}, rank {rank}: {reason}\n{tail}")
        time.sleep(0.1)


def compare(got: Tensors, want: Tensors) -> dict[str, Any]:
    a, b = (torch.cat([part[name].double().flatten() for name in want]) for part in (got, want))
    errors = torch.stack([(got[name] - g).abs().max() / g.abs().max() for name, g in want.items()])
    return {
        "ratio": float(a @ b / (b @ b)),
        "error": float(errors.max()),  # NaN when any is
        "error_l2": float((a - b).norm() / b.norm()),
        "worst": [list(want)[errors.argmax()]],
    }


def measure_gradients(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    stages = (1, 3) if args.quick else (0, 1, 2, 3)
    cases = [*(Case("gradient", stage) for stage in stages), Case("gradient", stage=3, reduce_scatter=False)]
    # ALST's scale is wrong at ZeRO 1 and right at ZeRO 3: there the error is all of the kind the section is about.
    for stage in (1, 3):
        cases += [Case("packed", stage, documents=(61, 29, 103, 63)), Case("accumulation", stage, strides=(1, 2))]
    cases = [case for case in cases if case.section in args.only]
    results: dict[str, list[dict[str, Any]]] = {}
    for name in [ONE, *args.contenders] if cases else []:
        console.print(f"gradients: {name} ...")
        results[name] = launch(name, cases, timeout=600)[0]
    return [
        {"section": case.section, "zero": case.zero, "contender": name}
        | compare(results[name][index]["gradients"], results[ONE][index]["gradients"])
        for index, case in enumerate(cases)
        for name in args.contenders
    ]


def measure_speed(args: argparse.Namespace, length: int, console: Console) -> list[dict[str, Any]]:
    turns, steps = args.turns or (1 if args.quick else 2), 2 if length > 8192 else 3
    case = Case("speed", documents=(length,), steps=steps, vocabulary=args.vocabulary)
    names = [*([ONE] if args.one_process else []), *args.contenders]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory = dict.fromkeys(names, 0.0)
    for turn in range(turns):
        for name in names[:: (-1) ** turn]:  # back and forth, so that a drift of the machine meets all alike
            console.print(f"speed: {length:,} tokens, turn {turn + 1} of {turns}: {name} ...")
            ranks = [result[0] for result in launch(name, [case], timeout=300 + 0.05 * length * (steps + 1))]
            seconds[name] += [max(times) for times in zip(*(rank["seconds"] for rank in ranks), strict=True)]
            memory[name] = max(memory[name], *(rank["memory"] for rank in ranks))
    alst = statistics.median(seconds.get(ALST, [float("nan")]))
    return [
        {"section": "speed", "tokens": length, "zero": "none" if name == ONE else case.zero, "contender": name}
        | {"seconds": statistics.median(times), "fastest": min(times), "to_alst": statistics.median(times) / alst}
        | {"peak_mib": memory[name], "all_seconds": times}
        for name, times in seconds.items()
    ]


def show(rows: list[dict[str, Any]], console: Console, markdown: bool) -> None:
    """One table for the gradients and one for the speed; a row's keys are its header, lists are left to the JSON."""
    for part in ([row for row in rows if (row["section"] == "speed") is speed] for speed in (False, True)):
        if not part:
            continue
        header = [key for key, value in part[0].items() if not isinstance(value, list)]
        cells = [[format(row[key], ".4g" if isinstance(row[key], float) else "") for key in header] for row in part]
        table = Table(*header)
        for line in cells:
            table.add_row(*line)
        console.print(table)
        if markdown:
            ruled = [header, ["---"] * len(header), *cells]
            print("", *(f"| {' | '.join(line)} |" for line in ruled), sep="\n")


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    packages = {name: version(name) for name in ("torch", "deepspeed", "transformers")}
    load = round(os.getloadavg()[0], 2)  # of others, before the first rank: above a few tenths the seconds are noise
    return {"cpu": cpu, "cores": os.cpu_count(), "load": load, **packages, "date": date.today().isoformat()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=SECTIONS, help="sections to run")
    parser.add_argument("--contenders", choices=[ALST, *OURS], nargs="+", default=[ALST, *OURS])
    parser.add_argument("--lengths", type=int, nargs="+", help="speed: tokens a row (4096 16384)")
    parser.add_argument("--vocabulary", type=int, default=0, help="speed: of the model (1024)")
    parser.add_argument("--one-process", action=argparse.BooleanOptionalAction, default=True, help="speed: time one process too")
    parser.add_argument("--turns", type=int, help="speed: fresh starts of each contender (2)")
    parser.add_argument("--quick", action="store_true", help="fewer ZeRO stages, 1,024 tokens, one turn")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    parser.add_argument("--markdown", action="store_true", help="tables in markdown on stdout, all else on stderr")
    args = parser.parse_args()
    args.lengths = args.lengths or ([1024] if args.quick else [4096, 16384])
    return args


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that launch ends its ranks
    console, about = Console(stderr=args.markdown), machine()
    # DeepSpeed compiles this at first use. A rank killed while it does leaves a lock on which every later run waits.
    subprocess.run([sys.executable, "-c", PREBUILD], env=environment(), check=True, timeout=900, stdout=sys.stderr)
    rows = measure_gradients(args, console)
    for length in args.lengths if "speed" in args.only else []:
        rows += measure_speed(args, length, console)
    show(rows, console, args.markdown)
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]))
    else:
        main()

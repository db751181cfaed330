"""The longest shard of a row that one GPU holds as a rank of a large job, ds_cp beside DeepSpeed's ALST, plain and with its tricks.

    python scripts/bench/memory.py --json memory.json                     # rank 7 of 8, Llama-8B shapes, state of 32 layers
    python scripts/bench/memory.py --plot memory.json --png memory.png
    python scripts/bench/memory.py --loss --json loss.json                # the loss alone: 16,384 tokens, vocabulary 128,256
    DS_ACCELERATOR=cpu python scripts/bench/memory.py --tiny              # proves the script where there is no GPU

One rank under PyTorch's fake process group, as in one_rank.py: ZeRO 3, bf16, torch's AdamW, gradient checkpointing, one document
of world * local tokens. Each contender steps at two short lengths, then just below and just above where the straight line through
its peaks meets the memory that there is, until a length that fits and one that does not are within --precision.

A layer's activations do not depend on how many layers there are, so --layers of them run; for those missing of --of-layers, an
allocation as large as their state on this rank (16 bytes a parameter / world) is made, and without the tricks the inputs that
checkpointing keeps of them. `--layers 32` runs them all. Attention runs its kernel (FlashAttention-2 as PyTorch ships it, the same
for all) with a window of --window keys, which leaves every buffer as large and makes a step's time linear in the length.

    peak_gib         highest torch.cuda.max_memory_allocated of a step; the limit is what the device has
    gib_by_part      the highest allocation while the part runs, state included; parts as in one_rank.py
    whole_attention_peak_gib  at the first length, of a step that attends every key
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import torch
from alst import machine, show, status_mib
from one_rank import GIB, LLAMA_8B, LOSS, REST, SAVED, TINY, Case, Timeline
from rich.console import Console
from torch import Tensor

RESULT = "memory result: "
STATE_BYTES = 16  # of a parameter: bf16 weight and gradient, fp32 weight, two moments
TRICKS = {"tiled_mlp": True, "activation_offload": True}
CONTENDERS: dict[str, tuple[str, bool, bool, dict[str, Any]]] = {  # contender, over a ring?, with tricks?, block
    "ALST": ("ALST", False, False, {}),
    "ALST, all tricks": ("ALST", False, True, {}),
    "ds_cp ulysses": ("ds_cp", False, True, TRICKS),
    "ds_cp ulysses, heads at once": ("ds_cp", False, True, {**TRICKS, "attention_head_chunks": 1}),
    "ds_cp ring": ("ds_cp", True, True, TRICKS),
}
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Search:
    """How the longest length is looked for."""

    first: tuple[int, ...]
    precision: float
    quantum: int
    """Lengths are multiples of this."""

    def next(self, passed: dict[int, float], failed: list[int], limit: float) -> int | None:
        """The length to try after these peaks (GiB) and failures; None when the answer is known closely enough."""
        left = [n for n in self.first if n not in passed and n < min(failed, default=n + 1)]
        if left or not passed or math.isinf(self.precision):
            return left[0] if left else None
        low, high = max(passed), min(failed, default=None)
        if high is not None and high / low <= 1 + self.precision + self.quantum / low:
            return None
        reach = self._reach(passed, limit)
        if high is not None:
            guess = max(high / (1 + self.precision) if reach >= high / 1.1 else reach, low * (1 + self.precision))
        else:
            guess = max(reach * (1 - self.precision), low * (1 + self.precision))
        guess = max(int(guess) // self.quantum * self.quantum, low + self.quantum)
        return guess if high is None or guess < high else None

    @staticmethod
    def _reach(passed: dict[int, float], limit: float) -> float:
        (a, low), (b, high) = sorted(passed.items())[-2:] if len(passed) > 1 else [(0, 0.0), *passed.items()]
        slope = max((high - low) / (b - a), 1e-9)
        return b + (limit - high) / slope


# What a rank runs.


def worker(job: dict[str, Any]) -> None:
    """Steps at one length after another, and says how each went, until one fails or the answer is known."""
    case, search = Case(**job["case"]), Search(**{**job["search"], "first": tuple(job["search"]["first"])})
    passed, failed = {int(n): gib for n, gib in job["passed"].items()}, job["failed"]
    limit = job["limit"] or device_gib()
    step, about = built(case, job)
    while (length := search.next(passed, failed, limit)) is not None:
        print("", RESULT + json.dumps({"local_tokens": length, "outcome": "started"}), sep="\n", flush=True)
        try:
            result = step(length) | about | {"outcome": "ok", "local_tokens": length}
            if result["peak_gib"] > limit:
                raise torch.OutOfMemoryError(f"out of memory: {result['peak_gib']:.2f} of {limit:.2f} GiB")
        except RuntimeError as error:
            if "out of memory" not in str(error).lower() and "ALLOC_FAILED" not in str(error):
                raise
            result = {"local_tokens": length, "outcome": OUT_OF_MEMORY, "message": str(error).split("\n")[0]}
        print("", RESULT + json.dumps(result | {"limit_gib": limit}), sep="\n", flush=True)
        if result["outcome"] != "ok":
            return
        passed[length] = result["peak_gib"]


def built(case: Case, job: dict[str, Any]) -> tuple[Callable[[int], dict[str, Any]], dict[str, Any]]:
    """(a step at a length, what is the same for all lengths)."""
    import one_rank

    shape = TINY if case.tiny else LLAMA_8B
    timeline = one_rank.become_rank(case)
    windows: list[int] = []
    if timeline.cuda:
        narrow_attention(windows)
    model = one_rank.make_model(case, longest=2**27)
    parameters = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    missing = max(job["of_layers"] - case.layers, 0)
    build = one_rank.build_ours if case.contender == "ds_cp" else build_alst_with_tricks if job["tricks"] else one_rank.build_alst
    engine, forward = build(model, case, timeline)
    run = one_rank.stepping(model, engine, forward, timeline)
    ballast = [torch.empty(STATE_BYTES * missing * layer // case.world, dtype=torch.uint8, device=engine.device)]
    run(one_rank.make_row(case.world * job["search"]["quantum"], shape[2]))  # ZeRO 3 records, the optimizer allocates
    gc.collect()
    state, weights = allocated(timeline), 2 * (parameters + missing * layer) / case.world
    about = {"state_gib": state / GIB, "parameters_gib": weights / GIB, "optimizer_gib": (state - weights) / GIB}

    def step(length: int) -> dict[str, Any]:
        row = one_rank.make_row(case.world * length, shape[2])
        if missing and not job["tricks"]:
            ballast.append(torch.empty(missing * length * shape[0], dtype=torch.bfloat16, device=engine.device))
        whole = {}
        if length == job["search"]["first"][0]:
            whole = {"whole_attention_peak_gib": measured(timeline, lambda: run(row))["peak_gib"]}
        windows[:] = [job["window"]] if job["window"] else []
        start = time.perf_counter()
        parts = measured(timeline, lambda: run(row)) | whole
        del ballast[1:]
        return parts | {"seconds": time.perf_counter() - start}

    return step, about


def build_alst_with_tricks(model: Any, case: Case, timeline: Timeline) -> tuple[Any, Callable[[dict[str, Tensor]], Tensor]]:
    import alst_tricks
    import one_rank
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model, core_attn_implementation=case.attention, sequence_parallel_size=case.world, micro_batch_size=1
    )
    alst_tricks.tile_mlps(model)
    alst_tricks.tile_loss(model, lambda function: timeline.part(LOSS, function))
    engine = one_rank.initialize(model, case, mpu)

    def forward(row: dict[str, Tensor]) -> Tensor:
        batch = one_rank.alst_shard(row, case, engine.device)
        shape = (*batch["shift_labels"].shape, model.config.hidden_size)
        with alst_tricks.inputs_on_host(torch.Size(shape)):
            return engine(**batch) / (case.world * batch["shift_labels"].numel())

    return engine, forward


def narrow_attention(windows: list[int]) -> None:
    """Both sides' kernel, in this process, attends `windows[0]` keys, if any: the same calls and buffers in linear time."""
    from ds_cp.kernels.attention import torch_flash

    torch_flash._window = lambda *_: {"window_size_left": windows[0], "window_size_right": 0} if windows else {}
    plain = torch.nn.functional.scaled_dot_product_attention

    class Narrow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, scale):  # [B, S, N, H]
            ctx.lengths, ctx.options = (None, None, q.shape[1], k.shape[1]), torch_flash._window() | {"scale": scale}
            out, lse, *ctx.rng = torch_flash._forward(q, k, v, *ctx.lengths, 0.0, True, False, **ctx.options)
            ctx.save_for_backward(q, k, v, out, lse)
            return out

        @staticmethod
        def backward(ctx, dout):
            saved = dout, *ctx.saved_tensors
            return *torch_flash._backward(*saved, *ctx.lengths, 0.0, True, ctx.rng[0], ctx.rng[1], **ctx.options), None

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if attn_mask is not None or dropout_p or not is_causal:
            return plain(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return Narrow.apply(*(x.transpose(1, 2) for x in (q, k, v)), scale).transpose(1, 2)

    torch.nn.functional.scaled_dot_product_attention = attention


def device_gib() -> float:
    return torch.cuda.mem_get_info()[1] / GIB if torch.cuda.is_available() else float("inf")


def allocated(timeline: Timeline) -> float:
    return torch.cuda.memory_allocated() if timeline.cuda else status_mib("VmRSS") * 2**20


def measured(timeline: Timeline, step: Callable[[], Tensor]) -> dict[str, Any]:
    """{"peak_gib", "gib_by_part"} of a step; on CPU the growth of the resident set, and no parts."""
    if not timeline.cuda:
        Path("/proc/self/clear_refs").write_text("5")
        step()
        return {"peak_gib": status_mib("VmHWM") / 1024, "gib_by_part": {}}
    parts = {name or REST: size / GIB for name, size in timeline.record("memory", step).items()}
    return {"peak_gib": max(size for name, size in parts.items() if name != SAVED), "gib_by_part": parts}


# What the parent runs.


def run(case: Case, job: dict[str, Any], timeout: float, tell: Callable[[dict[str, Any]], None], console: Console) -> None:
    """Every length that is tried, in fresh processes: one ends where memory does. `tell` hears of each at once."""
    search, passed, failed, limit = Search(**job["search"]), {}, [], 0.0
    end = time.monotonic() + timeout
    while not failed or search.next(passed, failed, limit) is not None:
        last = None
        for row in start({**job, "case": asdict(case), "passed": passed, "failed": failed}, case, end - time.monotonic(), console):
            tell(row)
            last, limit = row, row.get("limit_gib", limit)
            if row["outcome"] == "ok":
                passed[row["local_tokens"]] = row["peak_gib"]
        if last is None or last["outcome"] != OUT_OF_MEMORY:
            return
        failed.append(last["local_tokens"])


def start(job: dict[str, Any], case: Case, timeout: float, console: Console) -> Iterator[dict[str, Any]]:
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
    env = {"RANK": str(case.rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(case.world), "PYTHONPATH": path}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    command = [sys.executable, "-X", "faulthandler", __file__, "--worker", json.dumps(job)]
    process = subprocess.Popen(
        command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", text=True
    )
    killer = Timer(max(timeout, 1), process.kill)
    killer.start()
    lines, row = [], None
    try:
        for line in process.stdout:
            if not line.startswith(RESULT):
                lines.append(line.rstrip())
                continue
            row = json.loads(line.removeprefix(RESULT))
            if row["outcome"] != "started":
                yield row
        process.wait()
        if process.returncode:
            console.print(*lines[-25:], sep="\n", markup=False)
            yield {"local_tokens": (row or {}).get("local_tokens", 0), "outcome": "failed", "message": f"exit {process.returncode}"}
    finally:
        killer.cancel()
        process.kill()
        process.wait()


def plot(path: Path, png: Path) -> None:
    """Peak memory of a step over the length of the shard, by part, one panel a contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in json.loads(path.read_text())["rows"] if row.get("section") == "longest"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.2 * len(names), 4.2), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        mine = sorted((r for r in rows if r["name"] == name and r["outcome"] == "ok"), key=lambda r: r["local_tokens"])
        lengths = [row["local_tokens"] / 1000 for row in mine]
        weights = [row["parameters_gib"] for row in mine]
        axis.fill_between(lengths, 0, weights, label="parameters", alpha=0.6)
        axis.fill_between(lengths, weights, [row["state_gib"] for row in mine], label="optimizer, gradients", alpha=0.6)
        for label, parts in GROUPS.items():
            axis.plot(lengths, [max(row["gib_by_part"].get(part, 0) for part in parts) for row in mine], "o-", ms=3, label=label)
        failed = [row["local_tokens"] / 1000 for row in rows if row["name"] == name and row["outcome"] == OUT_OF_MEMORY]
        if failed:
            axis.axvline(min(failed), color="black", lw=0.8, ls=":", label="out of memory")
        axis.set(title=name, xlabel="local tokens (thousands)")
    axes[0][0].set_ylabel("GiB while the part runs, at most")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(png, dpi=110)


GROUPS = {
    "attention": ("attention kernels", "exchange copies", "exchange rest", "attention rest"),
    "MLP": ("mlp",),
    "logits and loss": (LOSS,),
    "norms, residuals, embedding": (REST,),
    "activations kept": (SAVED,),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    add("--world", type=int, default=8, help="ranks of the job, all sharing one row (8)")
    add("--layers", type=int, default=4, help="layers that run (4)")
    add("--of-layers", type=int, default=32, help="layers whose state is held (32)")
    add("--window", type=int, default=1024, help="keys that attention attends; 0: all (1024)")
    add("--first", type=int, nargs="+", default=[16384, 32768], help="short lengths that are tried first (16384 32768)")
    add("--precision", type=float, default=0.03, help="how far apart the last two lengths may be; inf: only the first (0.03)")
    add("--limit-gib", type=float, default=0, help="memory that there is, where it is less than the device's")
    add("--block", type=json.loads, default={}, help="ds_cp: more of the block, as JSON")
    add("--loss", action="store_true", help="the loss alone")
    add("--loss-tokens", type=int, default=16384, help="--loss: tokens (16384)")
    add("--tiny", action="store_true", help="a tiny model: proves the script")
    add("--timeout", type=float, default=300, help="seconds that a contender may take (300)")
    add("--json", type=Path, help="write the rows and the machine here, after every contender")
    add("--plot", type=Path, help="draw the rows of this file, and nothing else")
    add("--png", type=Path, default=Path("memory.png"))
    add("--markdown", action="store_true", help="tables in markdown on stdout, all else on stderr")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.plot:
        return plot(args.plot, args.png)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    console, about, rows = Console(stderr=args.markdown), machine(), []
    if args.loss:
        from memory_loss import loss_rows

        rows = loss_rows(*((64, 96, 32, 2) if args.tiny else (args.loss_tokens, 128256, 4096, 10)))
    about["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    search = {"first": tuple(args.first), "precision": args.precision, "quantum": 64 if args.tiny else 1024}
    for name in [] if args.loss else args.contenders:
        contender, ring, tricks, block = CONTENDERS[name]
        ours, cuda = contender == "ds_cp", torch.cuda.is_available()
        case = Case(
            contender=contender,
            attention=("torch_flash" if cuda else "auto") if ours else "sdpa",
            ulysses=1 if ring else args.world,
            ring=args.world if ring else 1,
            world=args.world,
            rank=args.world - 1,
            local_tokens=0,
            layers=args.layers,
            checkpointing=True,
            steps=0,
            tiny=args.tiny,
            block={**block, **args.block} if ours else {},
        )
        job = {"search": search, "tricks": tricks, "limit": args.limit_gib, "window": args.window, "of_layers": args.of_layers}
        console.print(f"{name} ...")

        def tell(row: dict[str, Any], name: str = name) -> None:
            rows.append({"section": "longest", "name": name} | row | {"layers": args.layers, "window": args.window})
            console.print({key: row.get(key) for key in ("local_tokens", "outcome", "peak_gib", "seconds")})
            if args.json:
                args.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")

        run(case, job, args.timeout, tell, console)
    if args.json:
        args.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    columns = ("section", "name", "local_tokens", "outcome", "peak_gib", "state_gib", "seconds")
    show(rows if args.loss else [{key: row.get(key, "-") for key in columns} for row in rows], console, args.markdown)
    sys.exit(any(row.get("outcome") == "failed" for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]))
        sys.stdout.flush()
        os._exit(0)  # with a step cut off by the end of memory, the end of the interpreter may abort
    else:
        main()

"""A whole training step of one rank of a large job, measured on one GPU: ds_cp beside DeepSpeed's own ALST.

    python scripts/bench/one_rank.py --json one_rank.json        # rank 7 of 8, Llama-8B shapes with 4 layers, two lengths
    python scripts/bench/one_rank.py --settings 8x1 1x8 --local-tokens 16384 --block '{"ring_impl": "allgather"}' --markdown
    DS_ACCELERATOR=cpu python scripts/bench/one_rank.py --tiny   # proves the script where there is no GPU

The process is one rank under PyTorch's fake process group: computation and memory are those of a rank of the job, the network
takes no time, and what a real job does not hide behind computation comes on top. ZeRO 3, bf16, torch's AdamW, no clipping, one
row of world * local tokens. Each contender has a process of its own: one that runs out of memory says so, the others go on.

The fake group writes nothing, and fresh buffers may hold NaN or zeros, with which a GPU is faster than with numbers. So receive
buffers are filled with what this rank sends: everything stays finite, though it is not a training run (a loss that is summed
over ranks is this rank's share). Those copies are a part of their own in the tables; ZeRO's run on streams of their own.

Left out: the measurement at the start of ds_cp.initialize (it needs a network), and ALST's loader, whose shards are cut
beforehand. ds_cp gets the whole row on the host and cuts it in the step.

    seconds          between the ends of successive steps (CUDA events; the host's clock on CPU): median of --steps
    peak_gib         torch.cuda.max_memory_allocated over those steps; state is what is allocated after initialisation
    seconds_by_part  one more step, with marks where a part begins and ends, in forward, backward and recomputation alike.
                     Exclusive: attention is without its exchange, that without copies and kernels. "rest" is norms, residuals,
                     embedding, cutting the row, and what ZeRO does not hide. The loss is with the lm head.
    gib_by_part      one more step: the highest allocation while the part runs, above that before the step; "saved" is what is
                     allocated where the loss begins: activations, and the parameters that are gathered then.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from alst import IGNORE, machine, show
from rich.console import Console
from torch import Tensor

WARM_UP = 3  # ZeRO 3 records the order of the parameters in the first step, kernels are compiled and chosen in the first two
GIB = 2**30
SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
LLAMA_8B = dict(zip(SIZES, (4096, 14336, 128256, 32, 8, 128), strict=True))
TINY = dict(zip(SIZES, (256, 512, 512, 16, 8, 16), strict=True))
KERNELS, COPIES, EXCHANGE, ATTENTION = "attention kernels", "exchange copies", "exchange rest", "attention rest"
MLP, LOSS, OPTIMIZER, REST, SAVED = "mlp", "loss", "optimizer", "rest", "saved"
PARTS = (KERNELS, COPIES, EXCHANGE, ATTENTION, MLP, LOSS, OPTIMIZER, REST)
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all", "all_to_all_single")
COLLECTIVES += ("batch_isend_irecv",)
STEP = ("outcome", "seconds", "fastest", "to_alst", "peak_gib", "peak_above_state_gib", "state_gib")

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One process: plain values, so that it travels there as JSON. `attention` is ds_cp's kernel or the core that ALST wraps."""

    contender: str
    attention: str
    ulysses: int
    ring: int
    rank: int
    local_tokens: int
    layers: int
    checkpointing: bool
    steps: int
    tiny: bool
    block: dict[str, Any]

    @property
    def world(self) -> int:
        return self.ulysses * self.ring

    @property
    def shape(self) -> dict[str, int]:
        return (TINY if self.tiny else LLAMA_8B) | {"num_hidden_layers": self.layers}


# What a worker runs: marks, the stand-in for the network, the two contenders.


class Timeline:
    """Which part of a step runs between two marks. While it is off, a marked function costs one comparison more."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.mode = cuda, "off"
        self.stack: list[str] = []
        self.marks: list[tuple[Any, str]] = []

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, moments: list[Any]) -> list[float]:
        if not self.cuda:
            return [end - start for start, end in pairwise(moments)]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(moments)]

    def enter(self, part: str) -> None:
        self.stack.append(part)
        self._mark()

    def leave(self) -> None:
        self.stack.pop()
        self._mark()

    def _mark(self) -> None:
        if self.mode == "time":
            moment = self.now()
        else:
            moment = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.marks.append((moment, self.stack[-1]))

    def record(self, mode: str, step: Step) -> dict[str, float]:
        """Runs a step. "time": exclusive seconds of each part. "memory": its highest allocation, and SAVED, in bytes."""
        self.mode, self.stack, self.marks = mode, [], []
        self.enter(REST)
        step()
        assert self.stack == [REST], f"unbalanced marks: {self.stack}"
        self._mark()
        self.mode = "off"
        moments, parts = map(list, zip(*self.marks, strict=True))
        out = dict.fromkeys(PARTS, 0.0)
        for part, value in zip(parts, self.seconds(moments) if mode == "time" else moments[1:], strict=False):
            out[part] = out[part] + value if mode == "time" else max(out[part], value[0])
        saved = next((allocated for (_, allocated), part in self.marks if part == LOSS), 0) if mode == "memory" else None
        return out if mode == "time" else out | {SAVED: saved}

    def part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, marked as a part; its backward too, where it has one."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            if self.mode == "off":
                return function(*args, **kwargs)
            self.enter(name)
            try:  # a recomputation ends early, by an exception
                given = _at_backward(self.leave, (*args, *kwargs.values()))
                out = function(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))
                outs = _at_backward(lambda: self.enter(name), out if isinstance(out, tuple) else (out,))
                return outs if isinstance(out, tuple) else outs[0]
            finally:
                self.leave()

        return marked


def _at_backward(call: Callable[[], None], values: tuple) -> tuple:
    """The same values; `call` runs as soon as the gradients of all tensors among them are there."""
    found = [i for i, x in enumerate(values) if isinstance(x, Tensor) and x.requires_grad]
    if not found or not torch.is_grad_enabled():
        return values
    marked = dict(zip(found, _Mark.apply(call, *(values[i] for i in found)), strict=True))
    return tuple(marked.get(i, x) for i, x in enumerate(values))


class _Mark(torch.autograd.Function):
    """The identity; its backward calls `call`."""

    @staticmethod
    def forward(ctx, call: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.call()
        return None, *grads


def echo(name: str, given: dict[str, Any]) -> None:
    """Fills the receive buffers of a collective with what this rank sends."""
    rank = dist.get_rank(given.get("group"))
    if name == "batch_isend_irecv":
        sent, received = ([p.tensor for p in given["p2p_op_list"] if p.op is op] for op in (dist.isend, dist.irecv))
        pairs = zip(received, sent, strict=True)
    elif name == "all_to_all":
        pairs = zip(given["output_tensor_list"], given["input_tensor_list"], strict=True)
    elif name == "all_to_all_single":
        pairs = [(given["output"], given["input"])]
    elif name == "reduce_scatter_tensor":
        pairs = [(given["output"].view(-1), given["input"].view(-1, given["output"].numel())[rank])]
    elif name == "all_gather_into_tensor":
        sent = given["input_tensor"].flatten()
        parts = given["output_tensor"].view(-1, len(sent))
        pairs = [(part, sent) for part in (parts[:rank], parts[rank], parts[rank + 1 :])]
    else:  # flash attention looks for documents in gathered positions: they must ascend from rank to rank
        x = given["tensor"]
        ahead = x.shape[1] if x.ndim == 2 and not x.is_floating_point() else 0
        pairs = [(out, x + (i - rank) * ahead if ahead else x) for i, out in enumerate(given["tensor_list"])]
    for out, x in pairs:
        if out.data_ptr() != x.data_ptr():  # ZeRO sends from where it receives
            out.copy_(x)


def echoing(name: str, timeline: Timeline) -> Callable[..., Any]:
    """The collective `name` of torch.distributed, which now fills its receive buffers."""
    send, marked = getattr(dist, name), timeline.part(COPIES, echo)
    signature = inspect.signature(send)

    def collective(*args: Any, **kwargs: Any) -> Any:
        beside = timeline.cuda and torch.cuda.current_stream() != torch.cuda.default_stream()  # ZeRO's
        with torch.no_grad():
            (echo if beside else marked)(name, signature.bind(*args, **kwargs).arguments)
        return send(*args, **kwargs)

    return collective


def start(case: Case) -> Timeline:
    """The fake process group, under torch and then under DeepSpeed, which keeps some of torch's collectives at its start."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    timeline = Timeline(cuda=get_accelerator().device_name() == "cuda")
    dist.init_process_group("fake", store=FakeStore(), rank=case.rank, world_size=case.world)
    for name in COLLECTIVES:
        setattr(dist, name, echoing(name, timeline))
    deepspeed.runtime.zero.utils.assert_lst_len_same_as_other_ranks = lambda ints: None  # rank 0 does not answer
    deepspeed.runtime.zero.utils.get_lst_from_rank0 = list
    if not timeline.cuda:
        deepspeed.comm.torch.build_shm_op = lambda: None  # it waits for the other ranks' shared memory
    deepspeed.init_distributed(dist_backend="fake")
    return timeline


def make_model(case: Case) -> Any:
    from deepspeed.accelerator import get_accelerator
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(case.rank)
    config = LlamaConfig(**case.shape, max_position_embeddings=case.world * case.local_tokens, use_cache=False)
    attention = case.attention if case.contender == "ALST" else "sdpa"  # ds_cp puts its own in this place
    with torch.device(get_accelerator().current_device_name()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def make_row(case: Case) -> dict[str, Tensor]:
    """One document on the host, the same for every rank."""
    length, generator = case.world * case.local_tokens, torch.Generator().manual_seed(7)
    ids = torch.randint(0, case.shape["vocab_size"], (1, length), generator=generator)
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(length)[None]}


def initialize(model: Any, case: Case, mpu: Any = None) -> Any:
    import deepspeed

    optimizer = {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
    config |= {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "optimizer": optimizer}
    config |= {"sequence_parallel_size": case.world, "steps_per_print": 10**9}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config, mpu=mpu)[0]


def build_alst(model: Any, case: Case, timeline: Timeline) -> Step:
    import torch.distributed.nn.functional as differentiable
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    core = case.attention
    ALL_ATTENTION_FUNCTIONS[core] = timeline.part(KERNELS, ALL_ATTENTION_FUNCTIONS[core])
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model, core_attn_implementation=core, sequence_parallel_size=case.world, micro_batch_size=1
    )
    engine = initialize(model, case, mpu)
    group, row = mpu.get_sequence_parallel_group(), make_row(case)
    row["shift_labels"] = torch.nn.functional.pad(row.pop("labels"), (0, 1), value=IGNORE)[:, 1:]
    shard = {key: x.chunk(case.world, dim=1)[case.rank].contiguous() for key, x in row.items()}

    def step() -> Tensor:
        batch = {key: x.to(engine.device) for key, x in shard.items()}
        labels = batch["shift_labels"]
        loss = model.loss_function(engine(**batch).logits, None, model.config.vocab_size, shift_labels=labels)
        losses = differentiable.all_gather(loss, group=group)
        counts = differentiable.all_gather((labels != IGNORE).sum(), group=group)
        loss = sum(part * count for part, count in zip(losses, counts, strict=True)) / max(sum(counts), 1)
        engine.backward(loss)
        timeline.part(OPTIMIZER, engine.step)()
        return loss.detach()

    return step


def build_ours(model: Any, case: Case, timeline: Timeline) -> Step:
    """ds_cp.engine.initialize without what needs an answer from other ranks."""
    from ds_cp import config, engine, mesh, topology
    from ds_cp.models import checks

    sizes = {"size": case.world, "ulysses_size": case.ulysses, "ring_size": case.ring}
    block = config.parse({config.BLOCK: {**case.block, **sizes, "attention_kernel": case.attention}})
    checks.refuse(model)
    degrees = topology.resolve(*sizes.values(), world=case.world, local_world=case.world, heads=checks.heads(model))
    mesh_ = mesh.build(degrees, block.comm_timeout_s)
    engine_ = initialize(model, case)
    handle = engine.attach_model(engine_.module, block, mesh_, engine_.gradient_accumulation_steps)
    kernel, row = handle.kernel, make_row(case)
    marked = {name: timeline.part(KERNELS, getattr(kernel, name)) for name in ("forward", "backward")}
    handle.kernel = SimpleNamespace(__name__=kernel.__name__, unsupported=kernel.unsupported, **marked)

    def step() -> Tensor:
        loss = engine_(**row).loss
        engine_.backward(loss)
        timeline.part(OPTIMIZER, engine_.step)()
        return loss.detach()

    return step


def mark_parts(model: Any, timeline: Timeline) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[name] = timeline.part(EXCHANGE, ALL_ATTENTION_FUNCTIONS[name])
    for layer in model.model.layers:
        for module, part in ((layer.self_attn, ATTENTION), (layer.mlp, MLP), (layer, REST)):
            module.forward = timeline.part(part, module.forward)
    model.lm_head.forward = timeline.part(LOSS, model.lm_head.forward)
    model.loss_function = timeline.part(LOSS, model.loss_function)


def measure(case: Case) -> dict[str, Any]:
    timeline = start(case)
    model = make_model(case)
    step = (build_alst if case.contender == "ALST" else build_ours)(model, case, timeline)
    mark_parts(model, timeline)
    state = torch.cuda.memory_allocated()
    losses = [float(step()) for _ in range(WARM_UP)]
    assert all(map(math.isfinite, losses)), losses
    if timeline.cuda:
        torch.cuda.reset_peak_memory_stats()
    moments = [timeline.now()]
    for _ in range(case.steps):
        step()
        moments.append(timeline.now())
    seconds = timeline.seconds(moments)
    out = {"loss": losses[-1], "seconds": statistics.median(seconds), "fastest": min(seconds), "all_seconds": seconds}
    if timeline.cuda:
        peak, before = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        out |= {"state_gib": state / GIB, "peak_gib": peak / GIB, "peak_above_state_gib": (peak - state) / GIB}
        out |= {"before_step_gib": before / GIB, "reserved_gib": torch.cuda.max_memory_reserved() / GIB}
        out["gib_by_part"] = {part: (size - before) / GIB for part, size in timeline.record("memory", step).items()}
    device = torch.cuda.get_device_name() if timeline.cuda else "cpu"
    return out | {"seconds_by_part": timeline.record("time", step), "device": device}


def worker(spec: Path) -> None:
    try:
        result = {"outcome": "ok"} | measure(Case(**json.loads(spec.read_text())))
    except torch.OutOfMemoryError as error:
        result = {"outcome": "out of memory", "message": str(error).split("\n")[0]}
    spec.with_name("result.json").write_text(json.dumps(result))


# What the parent runs: one process after another, tables.


def run(case: Case, timeout: float, console: Console) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
    job = {"RANK": str(case.rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(case.world), "PYTHONPATH": path}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # DeepSpeed asks for them; nothing listens there
    with tempfile.TemporaryDirectory() as folder:
        spec, log = Path(folder, "spec.json"), Path(folder, "log")
        spec.write_text(json.dumps(asdict(case)))
        command = [sys.executable, "-X", "faulthandler", __file__, "--worker", str(spec)]
        try:
            with log.open("wb") as out:
                subprocess.run(command, env=os.environ | job, stdout=out, stderr=subprocess.STDOUT, timeout=timeout, check=True)
            return json.loads(spec.with_name("result.json").read_text())
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            console.print(tail, markup=False)
            return {"outcome": "failed", "message": f"{type(error).__name__} {getattr(error, 'returncode', '')}\n{tail}"}


def tables(rows: list[dict[str, Any]], console: Console, markdown: bool) -> None:
    for section, columns in (("step", STEP), ("seconds_by_part", PARTS), ("gib_by_part", (SAVED, *PARTS))):
        view = []
        for row in rows:
            values = row if section == "step" else row.get(section, {})
            first = {key: row[key] for key in ("contender", "attention", "ulysses", "ring", "local_tokens")}
            view.append({"section": section, **first, **{key: values.get(key, "-") for key in columns}})
        show(view, console, markdown)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, default=8, help="ranks of the job, all sharing one row (8)")
    parser.add_argument("--rank", type=int, help="the rank to be (the last)")
    parser.add_argument("--local-tokens", type=int, nargs="+", help="tokens a rank (16384 32768)")
    parser.add_argument("--layers", type=int, default=4, help="(4)")
    parser.add_argument("--settings", nargs="*", help="ds_cp, ulysses x ring (8x1 4x2 2x4 1x8: what 8 heads and the world allow)")
    parser.add_argument("--kernel", default="auto", help="ds_cp: attention_kernel of the block")
    parser.add_argument("--block", type=json.loads, default={}, help="ds_cp: more of the block, as JSON")
    parser.add_argument("--alst", nargs="*", help="ALST: core attentions (sdpa, and flash_attention_2 where flash_attn is)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (5)")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and 64 local tokens: proves the script")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that a contender may take")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here, after every contender")
    parser.add_argument("--markdown", action="store_true", help="tables in markdown on stdout, all else on stderr")
    args = parser.parse_args()
    world = args.world
    args.rank = world - 1 if args.rank is None else args.rank
    args.local_tokens = args.local_tokens or ([64] if args.tiny else [16384, 32768])
    if args.settings is None:
        args.settings = [f"{n}x{world // n}" for n in (8, 4, 2, 1) if world % n == 0]
    args.settings = [tuple(map(int, setting.split("x"))) for setting in args.settings]
    if not 0 <= args.rank < world or any(len(sizes) != 2 or math.prod(sizes) != world for sizes in args.settings):
        parser.error(f"--rank must be below --world, and every setting ulysses x ring = {world}")
    if args.alst is None:
        flash = any(found.name.replace("-", "_") == "flash_attn" for found in distributions())
        args.alst = ["sdpa", "flash_attention_2"] if flash else ["sdpa"]
    return args


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that subprocess.run ends its child
    console, about, rows = Console(stderr=args.markdown), machine(), []
    common = {key: getattr(args, key) for key in ("rank", "layers", "checkpointing", "steps", "tiny", "block")}
    contenders = [("ALST", core, (args.world, 1)) for core in args.alst]
    contenders += [("ds_cp", args.kernel, sizes) for sizes in args.settings]
    for local_tokens in args.local_tokens:
        alst = None
        for contender, attention, (ulysses, ring) in contenders:
            console.print(f"{local_tokens:,} local tokens: {contender} {ulysses}x{ring} {attention} ...")
            case = Case(contender, attention, ulysses, ring, local_tokens=local_tokens, **common)
            row = asdict(case) | run(case, args.timeout, console)
            about["device"] = row.pop("device", about.get("device"))
            if "seconds" in row:
                alst = alst or (row["seconds"] if contender == "ALST" else None)
                row |= {"to_alst": row["seconds"] / alst} if alst else {}
            rows.append(row)
            if args.json:
                args.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    tables(rows, console, args.markdown)
    if any(row["outcome"] == "failed" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]))
    else:
        main()

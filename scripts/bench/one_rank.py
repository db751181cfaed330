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
Left out: ds_cp.initialize's measurement, which needs a network, and ALST's loader; a kernel's own sums over a ring's tiles, which
the marked kernel does not offer, and the ring's second stream, so a ring is faster than this. ds_cp cuts the row in the step.

    seconds          between the ends of successive steps (CUDA events; the host's clock on CPU): median of --steps
    peak_gib         torch.cuda.max_memory_allocated over those steps; state is what is allocated after initialisation
    seconds_by_part  of one more step, marked in forward, backward and recomputation alike. Exclusive: attention is without its
                     exchange, that without copies and kernels. The loss is with the lm head; "rest" is norms, residuals,
                     embedding, cutting the row, and what ZeRO does not hide.
    gib_by_part      of one more step: the highest allocation while the part runs, above that before the step; "saved" is what
                     is allocated where the loss begins: activations, and the parameters that are gathered then.
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
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
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

WARM_UP = 3  # ZeRO 3 records the order of the parameters in the first step; kernels are compiled and chosen in the first two
GIB = 2**30
SHAPE = ("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
LLAMA_8B, TINY = (4096, 14336, 128256, 32, 8, 128), (256, 512, 512, 16, 8, 16)
KERNELS, COPIES, EXCHANGE, ATTENTION = "attention kernels", "exchange copies", "exchange rest", "attention rest"
MLP, LOSS, OPTIMIZER, REST, SAVED = "mlp", "loss", "optimizer", "rest", "saved"
PARTS = (KERNELS, COPIES, EXCHANGE, ATTENTION, MLP, LOSS, OPTIMIZER, REST)
COLLECTIVES = ("all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all", "all_to_all_single")
COLLECTIVES += ("batch_isend_irecv",)
RESULT = "one_rank result: "


@dataclass(frozen=True)
class Case:
    """One process: plain values, so that it travels there as JSON. `attention` is ds_cp's kernel or the core that ALST wraps."""

    contender: str
    attention: str
    ulysses: int
    ring: int
    world: int
    rank: int
    local_tokens: int
    layers: int
    checkpointing: bool
    steps: int
    tiny: bool
    block: dict[str, Any]


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
        if self.cuda:
            torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 if self.cuda else end - start for start, end in pairwise(moments)]

    def mark(self, enter: str | None = None) -> None:
        """A part begins, or the one that began last ends."""
        self.stack = [*self.stack, enter] if enter else self.stack[:-1]
        if self.mode == "time":
            moment = self.now()
        else:
            moment = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self.marks.append((moment, self.stack[-1] if self.stack else ""))

    def record(self, mode: str, step: Callable[[], Tensor]) -> dict[str, float]:
        """Runs a step. "time": exclusive seconds of each part. "memory": its highest allocation, and SAVED, in bytes."""
        self.mode, self.stack, self.marks = mode, [], []
        self.mark(REST)
        step()
        self.mark()
        assert not self.stack, f"unbalanced marks: {self.stack}"
        self.mode = "off"
        moments, parts = map(list, zip(*self.marks, strict=True))
        out = dict.fromkeys(PARTS, 0.0)
        for part, value in zip(parts, self.seconds(moments) if mode == "time" else moments[1:], strict=False):
            out[part] = out[part] + value if mode == "time" else max(out[part], value[0])
        return out if mode == "time" else out | {SAVED: dict(zip(reversed(parts), reversed(moments), strict=True))[LOSS][1]}

    def part(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, marked as a part; its backward too, where it has one."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            if self.mode == "off":
                return function(*args, **kwargs)
            self.mark(name)
            try:  # a recomputation ends early, by an exception
                _at_gradients(self.mark, (*args, *kwargs.values()))
                out = function(*args, **kwargs)
                _at_gradients(lambda: self.mark(name), out if isinstance(out, tuple) else (out,))
                return out
            finally:
                self.mark()

        return marked


def _at_gradients(call: Callable[[], None], values: tuple) -> None:
    """Runs `call` when the gradients of all tensors among the values have come: the backward of what made them begins."""
    tensors = [x for x in values if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()]
    missing = len(tensors)

    def arrived(_: Tensor) -> None:
        nonlocal missing
        missing -= 1
        if not missing:
            call()

    for x in tensors:
        x.register_hook(arrived)


def echo(name: str, given: dict[str, Any]) -> None:
    """Fills the receive buffers of the collective `name` with what this rank sends."""
    received, sent = [*given.values(), None][:2]
    rank = dist.get_rank(given.get("group"))
    if name == "batch_isend_irecv":
        received, sent = ([p.tensor for p in received if p.op is op] for op in (dist.irecv, dist.isend))
    elif name == "all_to_all_single":
        received, sent = [received], [sent]
    elif name == "reduce_scatter_tensor":
        received, sent = [received.view(-1)], [sent.view(-1, received.numel())[rank]]
    elif name == "all_gather_into_tensor":
        parts = received.view(-1, sent.numel())
        received, sent = [parts[:rank], parts[rank], parts[rank + 1 :]], [sent.flatten()] * 3
    elif name == "all_gather":  # flash attention looks for documents in gathered positions: they must ascend from rank to rank
        ahead = sent.shape[1] if sent.ndim == 2 and not sent.is_floating_point() else 0
        sent = [sent + (i - rank) * ahead if ahead else sent for i in range(len(received))]
    for out, x in zip(received, sent, strict=True):
        if out.data_ptr() != x.data_ptr():  # ZeRO sends from where it receives
            out.copy_(x)


def echoing(name: str, timeline: Timeline) -> Callable[..., Any]:
    send, marked = getattr(dist, name), timeline.part(COPIES, echo)
    signature = inspect.signature(send)

    def collective(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():  # ZeRO's are not marked: they run on streams of their own
            (marked if EXCHANGE in timeline.stack else echo)(name, signature.bind(*args, **kwargs).arguments)
        return send(*args, **kwargs)

    return collective


def initialize(model: Any, case: Case, mpu: Any = None) -> Any:
    import deepspeed

    optimizer = {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
    config |= {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "optimizer": optimizer}
    config |= {"sequence_parallel_size": case.world, "steps_per_print": 10**9}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config, mpu=mpu)[0]


Forward = Callable[[dict[str, Tensor]], Tensor]


def build_alst(model: Any, case: Case, timeline: Timeline) -> tuple[Any, Forward]:
    import torch.distributed.nn.functional as differentiable
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    core = case.attention
    ALL_ATTENTION_FUNCTIONS[core] = timeline.part(KERNELS, ALL_ATTENTION_FUNCTIONS[core])
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        model, core_attn_implementation=core, sequence_parallel_size=case.world, micro_batch_size=1
    )
    engine = initialize(model, case, mpu)
    group = mpu.get_sequence_parallel_group()

    def forward(row: dict[str, Tensor]) -> Tensor:
        batch = alst_shard(row, case, engine.device)
        labels = batch["shift_labels"]
        loss = model.loss_function(engine(**batch).logits, None, model.config.vocab_size, shift_labels=labels)
        losses = differentiable.all_gather(loss, group=group)
        counts = differentiable.all_gather((labels != IGNORE).sum(), group=group)
        return sum(part * count for part, count in zip(losses, counts, strict=True)) / max(sum(counts), 1)

    return engine, forward


def alst_shard(row: dict[str, Tensor], case: Case, device: torch.device) -> dict[str, Tensor]:
    shifted = torch.nn.functional.pad(row["labels"], (0, 1), value=IGNORE)[:, 1:]
    whole = {key: x for key, x in row.items() if key != "labels"} | {"shift_labels": shifted}
    return {key: x.chunk(case.world, dim=1)[case.rank].to(device) for key, x in whole.items()}


def build_ours(model: Any, case: Case, timeline: Timeline) -> tuple[Any, Forward]:
    """ds_cp.engine.initialize without what needs an answer from other ranks."""
    from deepspeed.utils import set_z3_leaf_module

    from ds_cp import config, engine, mesh, topology, watch
    from ds_cp.models import checks, trial

    sizes = {"size": case.world, "ulysses_size": case.ulysses, "ring_size": case.ring}
    block = config.parse({config.BLOCK: {**case.block, **sizes, "attention_kernel": case.attention}})
    trial.refuse(model)
    degrees = topology.resolve(*sizes.values(), world=case.world, local_world=case.world, heads=checks.heads(model))
    mesh_ = mesh.build(degrees, block.comm_timeout_s)
    for module in engine._gathered_as_one(model, block):
        set_z3_leaf_module(module, True)
    engine_ = initialize(model, case)
    watch.begin = lambda **_: watch.Watch(dist.HashStore(), 0, ["here"])  # the store of rank 0 is not there
    handle = engine.attach_model(engine_.module, block, mesh_, engine_.gradient_accumulation_steps)
    handle.check_finite = lambda: None  # what a rank receives here is its own again, which a ring may add up to NaN
    kernel = handle.methods.attention
    marked = {name: timeline.part(KERNELS, getattr(kernel, name)) for name in ("forward", "backward")}
    marked_kernel = SimpleNamespace(__name__=kernel.__name__, unsupported=kernel.unsupported, **marked)
    handle.methods = replace(handle.methods, attention=marked_kernel, beside=None)
    return engine_, lambda row: engine_(**row).loss


def make_row(length: int, vocabulary: int) -> dict[str, Tensor]:
    """One document, on the host and the same for every rank."""
    ids = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(7))
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(length)[None]}


def make_model(case: Case, longest: int) -> Any:
    from deepspeed.accelerator import get_accelerator
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = dict(zip(SHAPE, TINY if case.tiny else LLAMA_8B, strict=True))
    config = LlamaConfig(**shape, num_hidden_layers=case.layers, max_position_embeddings=longest, use_cache=False)
    attention = case.attention if case.contender == "ALST" else "sdpa"  # ds_cp puts its own in this place
    with torch.device(get_accelerator().current_device_name()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def build(case: Case, timeline: Timeline) -> Callable[[], Tensor]:
    """A whole step."""
    row = make_row(case.world * case.local_tokens, (TINY if case.tiny else LLAMA_8B)[2])
    model = make_model(case, case.world * case.local_tokens)
    engine, forward = (build_alst if case.contender == "ALST" else build_ours)(model, case, timeline)
    step = stepping(model, engine, forward, timeline)
    return lambda: step(row)


def stepping(model: Any, engine: Any, forward: Forward, timeline: Timeline) -> Forward:
    """A step on a row, with its parts marked."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[name] = timeline.part(EXCHANGE, ALL_ATTENTION_FUNCTIONS[name])
    for layer in model.model.layers:
        for child in layer.children():  # norms too: they are recomputed in the middle of the backward of the mlp
            part = {layer.self_attn: ATTENTION, layer.mlp: MLP}.get(child, REST)
            child.forward = timeline.part(part, child.forward)
    model.lm_head.forward = timeline.part(LOSS, model.lm_head.forward)
    model.loss_function = timeline.part(LOSS, model.loss_function)
    optimize = timeline.part(OPTIMIZER, engine.step)

    def step(row: dict[str, Tensor]) -> Tensor:
        loss = forward(row)
        engine.backward(loss)
        optimize()
        return loss.detach()

    return step


def become_rank(case: Case) -> Timeline:
    """Makes this process that rank of a job whose other ranks do not exist."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    timeline = Timeline(cuda=get_accelerator().device_name() == "cuda")
    dist.init_process_group("fake", store=FakeStore(), rank=case.rank, world_size=case.world)
    for name in COLLECTIVES:  # before init_distributed, which keeps some of them
        setattr(dist, name, echoing(name, timeline))
    deepspeed.runtime.zero.utils.assert_lst_len_same_as_other_ranks = lambda ints: None  # rank 0 does not answer
    deepspeed.runtime.zero.utils.get_lst_from_rank0 = list
    if not timeline.cuda:
        deepspeed.comm.torch.build_shm_op = lambda: None  # it waits for the other ranks' shared memory
    deepspeed.init_distributed(dist_backend="fake")
    return timeline


def measure(case: Case) -> dict[str, Any]:
    timeline = become_rank(case)
    step = build(case, timeline)
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
        out["gib_by_part"] = {part: (size - before) / GIB for part, size in timeline.record("memory", step).items()}
    device = torch.cuda.get_device_name() if timeline.cuda else "cpu"
    return out | {"seconds_by_part": timeline.record("time", step), "device": device}


def worker(case: Case) -> None:
    try:
        result = {"outcome": "ok"} | measure(case)
    except torch.OutOfMemoryError as error:
        result = {"outcome": "out of memory", "message": str(error).split("\n")[0]}
    print("", RESULT + json.dumps(result), sep="\n")


def run(case: Case, timeout: float, console: Console) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
    job = {"RANK": str(case.rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(case.world), "PYTHONPATH": path}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # DeepSpeed asks for them; nothing listens there
    command = [sys.executable, "-X", "faulthandler", __file__, "--worker", json.dumps(asdict(case))]
    merged: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        out = subprocess.run(command, env=os.environ | job, timeout=timeout, **merged).stdout
    except subprocess.TimeoutExpired as error:
        out = (error.stdout or b"") + f"\n{error}".encode()
    lines = out.decode(errors="replace").splitlines()
    found = [line.removeprefix(RESULT) for line in lines if line.startswith(RESULT)]
    if not found:
        console.print(*lines[-15:], sep="\n", markup=False)
    return json.loads(found[0]) if found else {"outcome": "failed", "message": "\n".join(lines[-15:])}


def parse() -> argparse.Namespace:
    flash = [f"flash_attention_{n}" for n, name in ((2, "flash_attn"), (4, "flash_attn_4")) if any(distributions(name=name))]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--world", type=int, default=8, help="ranks of the job, all sharing one row (8)")
    add("--rank", type=int, help="the rank to be (the last; under the zigzag layout all ring ranks have the same work)")
    add("--local-tokens", type=int, nargs="+", default=[16384, 32768], help="tokens a rank (16384 32768)")
    add("--layers", type=int, default=4, help="(4)")
    add("--settings", nargs="*", default=["8x1", "4x2", "2x4", "1x8"], help="ds_cp, ulysses x ring (8x1 4x2 2x4 1x8)")
    add("--kernel", default="auto", help="ds_cp: attention_kernel of the block")
    add("--block", type=json.loads, default={}, help="ds_cp: more of the block, as JSON")
    add("--alst", nargs="*", default=["sdpa", *flash], help="ALST: core attentions (sdpa, and flash attention if installed)")
    add("--steps", type=int, default=5, help="timed steps (5)")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="of every layer, both contenders")
    add("--tiny", action="store_true", help="a tiny model and 64 local tokens: proves the script")
    add("--timeout", type=float, default=300, help="seconds that a contender may take (300)")
    add("--json", type=Path, help="write the rows and the machine here, after every contender")
    add("--markdown", action="store_true", help="tables in markdown on stdout, all else on stderr")
    args = parser.parse_args()
    args.rank = args.world - 1 if args.rank is None else args.rank
    args.local_tokens = [64] if args.tiny else args.local_tokens
    args.settings = [tuple(map(int, setting.split("x"))) for setting in args.settings]
    if not 0 <= args.rank < args.world or any(len(sizes) != 2 or math.prod(sizes) != args.world for sizes in args.settings):
        parser.error(f"--rank must be below --world, and every setting ulysses x ring = {args.world}")
    return args


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that subprocess.run ends its child
    console, about, rows = Console(stderr=args.markdown), machine(), []
    common = {key: getattr(args, key) for key in ("world", "rank", "layers", "checkpointing", "steps", "tiny", "block")}
    contenders = [("ALST", core, (args.world, 1)) for core in args.alst]
    contenders += [("ds_cp", args.kernel, sizes) for sizes in args.settings]
    for local_tokens in args.local_tokens:
        alst = None
        for contender, attention, (ulysses, ring) in contenders:
            console.print(f"{local_tokens:,} local tokens: {contender} {ulysses}x{ring} {attention} ...")
            case = Case(contender, attention, ulysses, ring, local_tokens=local_tokens, **common)
            row = asdict(case) | run(case, args.timeout, console)
            about["device"] = row.pop("device", about.get("device"))
            alst = alst or (row.get("seconds") if contender == "ALST" else None)
            row |= {"to_alst": row["seconds"] / alst} if alst and "seconds" in row else {}
            rows.append(row)
            if args.json:
                args.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    step = ("outcome", "seconds", "fastest", "to_alst", "peak_gib", "peak_above_state_gib", "state_gib")
    first = ("contender", "attention", "ulysses", "ring", "local_tokens")
    for section, columns in (("step", step), ("seconds_by_part", PARTS), ("gib_by_part", (SAVED, *PARTS))):
        values = [{key: row[key] for key in first} | (row if section == "step" else row.get(section, {})) for row in rows]
        view = [{"section": section} | {key: value.get(key, "-") for key in (*first, *columns)} for value in values]
        show(view, console, args.markdown)
    sys.exit(any(row["outcome"] == "failed" for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Case(**json.loads(sys.argv[2])))
    else:
        main()

"""A DeltaNet layer's convolution and delta rule as one rank of W runs them, on one GPU: forward and backward.

    python scripts/bench/delta.py --json delta.json                   # some minutes on an H200, most of them compiling
    python scripts/bench/delta.py --read delta.json                   # the table of an earlier run, no GPU
    python scripts/bench/delta.py --device cpu --tiny                 # proves the script where there is no GPU

whole        all heads, the whole row, one process: fla's own function, as a model without ds_cp runs it. "efficiency" of the
             others is its time / W / theirs
heads        1/W of the heads, the whole row: what the kernel chooses
heads uncut  the same through fla's own function
heads P      the same cut into segments so that value heads x segments are P
state        all heads, 1/W of the row, state passed: what the kernel chooses; state P as above
state fla    the same through fla's context parallel operators, on a process group that sends nothing

A rank's neighbours are not there: what it gathers is W copies of its own, so that memory traffic is there and time on the network
is not. It is rank W // 2 and the row is one document, so state comes in and goes out. bf16; fp32 on CPU. Time is between CUDA
events, the median of as many calls as fit into --seconds; extra_mib is the peak above the inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a plain checkout needs no installation

from ds_cp.kernels import delta
from ds_cp.kernels.delta import Span, piece

WIDTH = 4
Row = dict[str, Any]
Rule = Callable[..., Tensor]


def inputs(args: argparse.Namespace, tokens: int, key_heads: int, value_heads: int) -> list[Tensor]:
    """q, k, v packed for the convolution, decay, beta, the convolution's weight."""
    generator = torch.Generator(device=args.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=args.device, generator=generator)

    channels = (2 * key_heads + value_heads) * args.size
    packed, beta = normal(tokens, channels).to(args.dtype), normal(tokens, value_heads).sigmoid().to(args.dtype)
    g = -torch.nn.functional.softplus(normal(tokens, value_heads)) * 0.1
    return [x.requires_grad_() for x in (packed, g, beta, normal(channels, WIDTH).to(args.dtype) / 2)]


def core(kernel: delta.Kernel, rule: Rule, tensors: list[Tensor], key_heads: int, value_heads: int, span: Span) -> Tensor:
    packed, g, beta, weight = tensors
    size = packed.shape[1] // (2 * key_heads + value_heads)
    convolved = kernel.convolve(packed, weight, None, "silu", span)
    q, k, v = convolved.split([key_heads * size, key_heads * size, value_heads * size], 1)
    heads = (x.unflatten(1, (-1, size)) for x in (q, k, v))
    return rule(*heads, g, beta, span)


def uncut(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, span: Span) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    tensors = (x.unsqueeze(0) for x in (q, k, v, g, beta))
    return chunk_gated_delta_rule(*tensors, use_qk_l2norm_in_kernel=True, cu_seqlens=span.cu_seqlens)[0].squeeze(0)


def cut(programs: int) -> Rule:
    """Ours with another number of segments."""
    from ds_cp.kernels.delta import fla

    def rule(*tensors_and_span: Any) -> Tensor:
        *tensors, span = tensors_and_span
        tokens = fla.segment_tokens(span, tensors[2].shape[1], programs) or span.tokens
        plan = fla.plan_of(span, tensors[0].device, tokens)
        return fla.Segments.apply(*(x.unsqueeze(0) for x in tensors), span, plan).squeeze(0)

    return rule


class FlaPassing:
    """fla's own convolution and rule with state passing, where a kernel and its rule stand."""

    def __init__(self, documents: tuple[int, ...], ranks: int, device: str) -> None:
        import torch.distributed as dist
        from fla.ops.cp import build_cp_context
        from torch.testing._internal.distributed.fake_pg import FakeStore

        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=ranks // 2, world_size=ranks)
        self.context = build_cp_context(torch.tensor(documents, device=device), dist.group.WORLD, conv1d_kernel_size=WIDTH)

    def convolve(self, x: Tensor, weight: Tensor, bias: None, activation: str, span: Span) -> Tensor:
        from fla.modules.causal_conv1d import causal_conv1d

        return causal_conv1d(x.unsqueeze(0), weight, bias, activation=activation, cp_context=self.context)[0].squeeze(0)

    def rule(self, *tensors_and_span: Any) -> Tensor:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        tensors = (x.unsqueeze(0) for x in tensors_and_span[:-1])
        return chunk_gated_delta_rule(*tensors, use_qk_l2norm_in_kernel=True, cp_context=self.context)[0].squeeze(0)


def contender(args: argparse.Namespace, name: str, ranks: int) -> tuple[Any, Rule, int, int, Span]:
    """(kernel, rule, key heads, value heads, span) of one row of the table."""
    kernel = delta.load(args.kernel)
    mode, _, how = name.partition(" ")
    heads = [max(n // ranks, 1) if mode == "heads" else n for n in args.heads]
    assert args.heads[1] % ranks == 0 or mode != "heads", "value heads are the unit"
    if mode == "state":
        span = piece((0, args.tokens), ranks // 2, ranks, lambda x: x.unsqueeze(0).expand(ranks, *x.shape).contiguous())
    else:
        span = Span((0, args.tokens))
    on_device = torch.tensor(span.documents, device=args.device)
    span = Span(span.documents, on_device, span.passing)
    rules = {"": kernel.delta_rule, "uncut": uncut}
    if how == "fla":
        kernel = FlaPassing((0, args.tokens), ranks, args.device)
        return kernel, kernel.rule, *heads, span
    if mode == "whole" and args.kernel == "fla":
        return kernel, uncut, *heads, span
    return kernel, rules[how] if how in rules else cut(int(how)), *heads, span


def measure(args: argparse.Namespace, name: str, ranks: int) -> Row:
    kernel, rule, key_heads, value_heads, span = contender(args, name, ranks)
    tensors = inputs(args, span.tokens, key_heads, value_heads)
    dout = torch.randn(span.tokens, value_heads, args.size, device=args.device, dtype=args.dtype)

    def once() -> tuple[Any, Any, Any]:
        start, middle, end = (moment(args.device) for _ in range(3))
        mark(start)
        out = core(kernel, rule, tensors, key_heads, value_heads, span)
        mark(middle)
        torch.autograd.grad(out, tensors, dout)
        mark(end)
        return start, middle, end

    began = time.monotonic()
    once()
    synchronize(args.device)
    first = time.monotonic() - began
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if args.device == "cuda" else 0
    began = time.monotonic()
    once()
    synchronize(args.device)
    calls = max(3, min(args.calls, int(args.seconds / max(time.monotonic() - began, 1e-6))))
    times = [once() for _ in range(calls)]
    synchronize(args.device)
    forward = statistics.median(between(a, b) for a, b, _ in times)
    total = statistics.median(between(a, c) for a, _, c in times)
    row = {"forward_ms": forward, "backward_ms": total - forward, "total_ms": total, "calls": calls, "first_s": first}
    if args.device == "cuda":
        row["extra_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    if args.profile:
        row["kernels"] = profile(once)
    return row


def profile(once: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds of the ten kernels that take most, of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        once()
        torch.cuda.synchronize()
    found = sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)[:10]
    return {f"{event.key[:70]} x{event.count}": round(event.self_device_time_total / 1000, 3) for event in found}


class Clock:
    def __init__(self) -> None:
        self.at = 0.0


def moment(device: str) -> Any:
    return torch.cuda.Event(enable_timing=True) if device == "cuda" else Clock()


def mark(event: Any) -> None:
    if isinstance(event, Clock):
        event.at = time.perf_counter()
    else:
        event.record()


def between(start: Any, end: Any) -> float:
    return 1000 * (end.at - start.at) if isinstance(start, Clock) else start.elapsed_time(end)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def run(args: argparse.Namespace) -> None:
    rows: list[Row] = []
    for ranks, name in [(1, "whole"), *((ranks, name) for name in args.contenders for ranks in args.ranks)]:
        row: Row = {"contender": name, "ranks": ranks}
        try:
            row |= measure(args, name, ranks)
        except Exception as error:  # the others go on
            row["outcome"] = f"failed: {type(error).__name__}: {error}"[:300]
        rows.append(row)
        if "total_ms" in row and "total_ms" in rows[0]:
            row["efficiency"] = rows[0]["total_ms"] / ranks / row["total_ms"]
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        if args.json:
            args.json.write_text(json.dumps({"machine": machine(args), "rows": rows}, indent=1) + "\n")


def machine(args: argparse.Namespace) -> Row:
    packages = {}
    for name in ("torch", "triton", "fla-core", "tilelang", "flash-qla"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else "none"
    settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path | torch.dtype)}
    return {"gpu": gpu, **packages, "date": date.today().isoformat(), "arguments": settings}


def table(rows: list[Row]) -> None:
    print("| ranks | | forward ms | backward ms | both ms | efficiency | extra MiB |\n| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        cells = [row["ranks"], row["contender"]]
        cells += [f"{row[key]:.2f}" if key in row else "-" for key in ("forward_ms", "backward_ms", "total_ms", "efficiency")]
        print("|", " | ".join(map(str, [*cells, f"{row.get('extra_mib', 0):,.0f}"])), "|")


def parse() -> argparse.Namespace:
    def heads(text: str) -> tuple[int, int]:
        key, value = text.split("/")
        return int(key), int(value)

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--kernel", help="fla; on CPU reference")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--heads", type=heads, default=(16, 32), help="key/value heads (16/32)")
    parser.add_argument("--size", type=int, default=128, help="of a head")
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8, 16])
    parser.add_argument("--contenders", nargs="*", default=["heads", "heads uncut", "state", "state fla"])
    parser.add_argument("--seconds", type=float, default=0.5, help="to spend on timing a row")
    parser.add_argument("--calls", type=int, default=30, help="at most")
    parser.add_argument("--profile", action="store_true", help="keep the kernels that take most")
    parser.add_argument("--tiny", action="store_true", help="hundreds of tokens: proves the script")
    parser.add_argument("--json", type=Path, help="write the rows and the machine here, after every row")
    parser.add_argument("--read", type=Path, help="measure nothing; the table of this JSON")
    args = parser.parse_args()
    args.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    args.kernel = args.kernel or ("fla" if args.device == "cuda" else "reference")
    if args.tiny:
        args.tokens, args.size, args.ranks, args.contenders = 512, 16, [2, 4], ["heads", "state"]
    return args


def main() -> None:
    args = parse()
    if args.read:
        table(json.loads(args.read.read_text())["rows"])
    else:
        run(args)


if __name__ == "__main__":
    main()

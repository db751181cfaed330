"""A plan as a table in the shell, as JSON, and one of its rows as a ds_config."""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from ds_cp.planner.choice import Choice
from ds_cp.planner.machine import HOST_ADAM, HOST_GB_PER_S, RESERVE_GIB, Link
from ds_cp.planner.memory import Memory, gib
from ds_cp.planner.search import Plan, Row

COLUMNS = (
    "",
    "ulysses x ring x data",
    "ZeRO",
    "settings",
    "state GiB",
    "kept",
    "at work",
    "in all",
    "on the host",
    "GB sent",
    "s a step",
    "tokens/s a GPU",
)
WIDTH = 150
"""Of the table where the shell does not say its own, or has less."""


def settings(choice: Choice) -> str:
    """What a choice does beside its degrees and ZeRO stage."""
    words = ["checkpointing"] if choice.checkpointing else []
    if choice.degrees.size > 1:
        words += [] if choice.tiled_loss else ["loss_chunk 0"]
        words += ["tiled_mlp"] * choice.tiled_mlp + ["activation_offload"] * choice.activation_offload
        words += [f"head_chunks {choice.head_chunks}"] if choice.head_chunks > 1 else []
    return ", ".join(words) or "-"


def zero(choice: Choice) -> str:
    where = ["parameters"] * choice.offload_parameters + ["optimizer"] * choice.offload_optimizer
    return f"{choice.stage}" + (f", {' and '.join(where)} on the host" if where else "")


def show(plan: Plan, console: Console, most: int) -> None:
    """The table, best first; what the best row's memory and time are made of; what was left out, and why."""
    machine, shape, length = plan.machine, plan.shape, plan.documents[-1]
    console.width = max(console.width, WIDTH)
    say = partial(console.print, highlight=False, soft_wrap=True)
    say(
        f"{shape.name}: {_count(shape.parameters)} parameters, {shape.layers} layers; rows of {length:,} tokens in "
        f"{len(plan.documents) - 1:,} documents; {machine.gpus} x {machine.gpu.name} with {machine.gpu.memory_gib:.1f} GiB, of "
        f"which {RESERVE_GIB} are left alone; {_link(machine.inside)} inside a host of {machine.per_host}"
        + (f", {_link(machine.between)} between hosts" if machine.hosts > 1 else "")
    )
    table = Table(title="predictions, not measurements (docs/planner.md says what they are worth)", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("ZeRO", "settings") else "right")
    for number, row in enumerate(plan.rows[:most], start=1):
        table.add_row(str(number), *_cells(row))
    console.print(table)
    for number, row in enumerate(plan.rows[:most], start=1):
        say(f"row {number}: {row.reason or 'nothing is shared or saved'}")
    best = plan.rows[0]
    flows = {"all-to-all": best.traffic.all_to_all, "ring": best.traffic.ring, "ZeRO": best.traffic.zero}
    say("memory of row 1, GiB: " + _sum({name: gib(size) for name, size in best.memory.parts.items()}, ".1f"))
    say("time of row 1, s: " + _sum({**best.times.compute, **_waits(best)}, ".3g"))
    say("sent by a GPU in a step of row 1, GB: " + _sum({name: flow.sent / 1e9 for name, flow in flows.items()}, ".3g"))
    for line in left_out(plan):
        say(line)


def left_out(plan: Plan) -> list[str]:
    """What is illegal or too large, counted."""
    lines = [f"{plan.fitting:,} choices fit; shown is the best of each ulysses x ring x data"]
    if plan.too_large:
        least = [f"{d.ulysses} x {d.ring} x {d.data} takes {gib(size):,.0f} GiB at least" for d, size in plan.too_large.items()]
        lines.append(f"too large: {len(least)} of ulysses x ring x data: {_first(least)}")
    if plan.illegal:
        reasons = [reason if count == 1 else f"{reason} ({count} times)" for reason, count in plan.illegal.items()]
        lines.append(f"illegal: {sum(plan.illegal.values())} of ulysses x ring x data: {_first(reasons)}")
    if plan.shape.tiled_mlp_refused:
        lines.append(f"left out everywhere: {plan.shape.tiled_mlp_refused}")
    return lines


def _first(reasons: list[str], most: int = 4) -> str:
    return "; ".join(reasons[:most]) + (f"; and {len(reasons) - most} more" if len(reasons) > most else "")


def _cells(row: Row) -> list[str]:
    degrees, memory = row.choice.degrees, row.memory
    return [
        f"{degrees.ulysses} x {degrees.ring} x {degrees.data}",
        zero(row.choice),
        settings(row.choice),
        *(f"{gib(size):.1f}" for size in _in_three(memory)),
        f"{gib(memory.peak):.1f}",
        f"{gib(memory.host):.0f}" if memory.host else "-",
        _three(row.traffic.sent / 1e9),
        _three(row.times.seconds),
        f"{row.tokens_per_second:,.0f}",
    ]


def _in_three(memory: Memory) -> tuple[float, float, float]:
    """Of the parts at the worst moment: the state with its gradients, what is kept for backward, what is at work."""
    *state, kept, working = memory.parts.values()
    return sum(state), kept, working


def _three(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _waits(row: Row) -> dict[str, float]:
    return {f"waiting for {name}": seconds for name, seconds in row.times.waits.items()}


def _sum(parts: dict[str, float], form: str) -> str:
    shown = [f"{name} {size:{form}}" for name, size in parts.items() if size > 0.0005 * sum(parts.values())]
    return " + ".join(shown) + f" = {sum(parts.values()):{form}}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 10**8 else f"{parameters / 1e6:.2f} M"


def _link(link: Link) -> str:
    if link.name.endswith("GB/s"):
        return link.name
    return f"{link.name} ({link.gb_per_s:g} GB/s{' a host' if link.shared else ' a GPU'}{', assumed' if link.assumed else ''})"


def ds_config(choice: Choice) -> dict[str, object]:
    """A whole one. One row a replica, no accumulation; gradients are clipped to 1."""
    zero: dict[str, object] = {"stage": choice.stage}
    if choice.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if choice.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    if choice.stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "sequence_parallel": _block(choice),
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
    }


def _block(choice: Choice) -> dict[str, object]:
    degrees = choice.degrees
    if degrees.size == 1:
        return {"size": 1}
    block: dict[str, object] = {"size": degrees.size, "ulysses_size": degrees.ulysses, "ring_size": degrees.ring}
    block |= {"attention_head_chunks": choice.head_chunks, "loss_chunk": "auto" if choice.tiled_loss else 0}
    return block | {"tiled_mlp": choice.tiled_mlp, "activation_offload": choice.activation_offload}


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    machine = plan.machine
    return {
        "model": {"name": plan.shape.name, "parameters": plan.shape.parameters, "layers": plan.shape.layers},
        "machine": {
            "gpus": machine.gpus,
            "gpus_per_host": machine.per_host,
            "gpu": machine.gpu.name,
            "memory_bytes": machine.memory,
            "inside": vars(machine.inside),
            "between": vars(machine.between),
            "host_memory_gib": machine.host_memory_gib,
            "host_gb_per_s": HOST_GB_PER_S,
            "host_adam_bytes_per_s": HOST_ADAM,
        },
        "tokens": plan.documents[-1],
        "documents": len(plan.documents) - 1,
        "fitting": plan.fitting,
        "too_large": {f"{d.ulysses} x {d.ring} x {d.data}": size for d, size in plan.too_large.items()},
        "illegal": plan.illegal,
        "rows": [_row(row) for row in plan.rows],
    }


def _row(row: Row) -> dict[str, Any]:
    degrees = row.choice.degrees
    flows = {"all_to_all": row.traffic.all_to_all, "ring": row.traffic.ring, "zero": row.traffic.zero}
    return {
        "ulysses": degrees.ulysses,
        "ring": degrees.ring,
        "data": degrees.data,
        "gradient_checkpointing": row.choice.checkpointing,
        "ds_config": ds_config(row.choice),
        "tokens_of_a_rank": row.tokens,
        "memory": {"peak": row.memory.peak, "moment": row.memory.moment, "parts": row.memory.parts, "host": row.memory.host},
        "traffic": {name: vars(flow) for name, flow in flows.items()},
        "seconds": row.times.seconds,
        "compute": row.times.compute,
        "waits": row.times.waits,
        "tokens_per_second_of_a_gpu": row.tokens_per_second,
        "because": row.reason,
    }

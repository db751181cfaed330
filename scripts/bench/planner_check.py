"""What `ds-cp plan` predicts beside what was measured: the tables of docs/planner.md.

    python scripts/bench/planner_check.py                        # prints the tables from docs/data/*.json
    python scripts/bench/planner_check.py --write docs/planner.md    # puts them into the docs

Nothing is measured here: the files are those that one_rank.py, memory.py, real_ranks.py, attention.py, link.py and
planner_memory.py left. The planner's test computes the same rows and holds them to the bars.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from planner_points import DATA, LLAMA_8B, MEMORY_BAR, MIB, TIME_BAR, TRAFFIC_BAR, Point, describe, device, llama, read, shape_of
from transformers import CONFIG_MAPPING

from ds_cp.planner import machine as machines
from ds_cp.planner import memory, search, times, traffic
from ds_cp.planner.choice import Choice
from ds_cp.planner.machine import GIB, Link, Machine
from ds_cp.planner.shape import Linear, Shape
from ds_cp.topology import Topology

REFERENCE_DELTA = "a CPU runs the reference DeltaNet kernel, in fp32; a GPU's takes other memory"
FITTED = "what such a layer holds was fitted to this peak"
TRAINER = "h200_trainer.json"
BYTE_VOCABULARY = 258
"""Of the tokenizer that scripts/train.py gives a model from scratch."""
MARK = "<!-- what follows is written by scripts/bench/planner_check.py -->"


# Memory


def memory_points() -> Iterator[Point]:
    yield from _counted()
    yield from _one_rank_memory()
    yield from _longest()
    yield from _real_ranks_memory()
    yield from _trainer_memory()


def _counted() -> Iterator[Point]:
    """Of planner_memory.py: counted on the CPU."""
    shapes: dict[str, Shape] = {}
    for row in read("planner_memory.json")["rows"]:
        if row["outcome"] != "ok":
            continue
        choice, key = counted_choice(row), f"{row['model_type']} {row['layers']}"
        shape = shapes[key] = shapes.get(key) or counted_shape(row)
        found = memory.of(shape, choice, row["local_tokens"], counted_settings(row))
        on_host = found.host if choice.offload_optimizer else 0.0  # the CPU's memory is both
        what = f"{row['model_type']}, {row['layers']} layers, {row['local_tokens']:,} tokens, {describe(choice)}"
        what += ", allgather" * (row["block"].get("ring_impl") == "allgather")
        sizes = (found.peak + on_host) / MIB, row["peak_mib"], "MiB"
        beyond = REFERENCE_DELTA if shape.linear else ""
        yield Point("memory, counted on a CPU", "planner_memory.json", what, *sizes, MEMORY_BAR, beyond, state=row["state_mib"])


def counted_shape(row: dict[str, Any]) -> Shape:
    import planner_memory

    case = planner_memory.Case(**{key: row[key] for key in planner_memory.Case.__dataclass_fields__ if key in row})
    return shape_of(planner_memory.make_config(case))


def counted_choice(row: dict[str, Any]) -> Choice:
    block, zero = row["block"], row["zero"]
    return Choice(
        degrees=Topology(row["ulysses"], row["ring"], row["world"] // row["ulysses"] // row["ring"]),
        stage=row["stage"],
        offload_optimizer="offload_optimizer" in zero,
        offload_parameters="offload_param" in zero,
        checkpointing=row["checkpointing"],
        activation_offload=block.get("activation_offload", False),
        tiled_mlp=block.get("tiled_mlp", False),
        tiled_loss="loss_chunk" in block,
        head_chunks=block.get("attention_head_chunks", 4 if block.get("activation_offload") else 1),
    )


def counted_settings(row: dict[str, Any]) -> memory.Settings:
    """The small buckets that the run had; fp32 logits of a tile on a CPU; AdamW without its foreach form, at ZeRO 0 one parameter
    after another."""
    tile = 2.0 * row["block"].get("loss_chunk", 0) * row["vocabulary"]
    live = row["zero"].get("stage3_max_live_parameters", 1e9)
    parts = {"tile_bytes": tile or memory.TILE_BYTES, "tile_copies": 6.0, "optimizer_bytes": 12.0, "unsharded_bytes": 0.5}
    return memory.Settings(bucket=1e5, live=live, fixed=0.0, **parts)


def _one_rank_memory() -> Iterator[Point]:
    for name in sorted(path.name for path in DATA.glob("h*_one_rank_*.json")):
        for row in _ours(read(name)["rows"]):
            shape, choice = llama(*LLAMA_8B, row["layers"]), one_rank_choice(row)
            found = memory.of(shape, choice, row["local_tokens"])
            what = f"{row['local_tokens']:,} tokens, {describe(choice)}"
            yield Point("memory, one GPU", name, what, found.peak / GIB, row["peak_gib"], "GiB", MEMORY_BAR)


def _ours(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("contender") == "ds_cp" and row.get("outcome", "ok") == "ok"]


def one_rank_choice(row: dict[str, Any]) -> Choice:
    """Those figures are of whole logits where the peak says so: they were taken before the loss was in tiles."""
    block = row.get("block") or {}
    whole = row["peak_gib"] - row.get("state_gib", 0) > row["local_tokens"] * LLAMA_8B[2] * 12 / GIB
    degrees = Topology(row["ulysses"], row["ring"], row["world"] // row["ulysses"] // row["ring"])
    offload = block.get("activation_offload", False)
    return Choice(
        degrees,
        stage=3,
        checkpointing=row.get("checkpointing", True),
        activation_offload=offload,
        tiled_mlp=block.get("tiled_mlp", False),
        tiled_loss=not whole,
        head_chunks=_chunks(block, degrees),
    )


def _chunks(block: dict[str, Any], degrees: Topology) -> int:
    most = LLAMA_8B[3] // degrees.ulysses if degrees.ulysses > 1 else 1
    return block.get("attention_head_chunks", most if block.get("activation_offload") else 1)


def _longest() -> Iterator[Point]:
    """Of memory.py: fewer layers run than there is state for, which an allocation stands in for."""
    tricks = {"tiled_mlp": True, "activation_offload": True}
    blocks = {"ds_cp ulysses": tricks, "ds_cp ring": tricks, "ds_cp ulysses, heads at once": {**tricks, "attention_head_chunks": 1}}
    for name in sorted(path.name for path in DATA.glob("h*_memory*.json")):
        for row in read(name)["rows"]:
            if row.get("name") not in blocks:
                continue
            block, world = blocks[row["name"]], 8
            degrees = Topology(1, world, 1) if row["name"].endswith("ring") else Topology(world, 1, 1)
            choice = Choice(degrees, 3, activation_offload=True, tiled_mlp=True, head_chunks=_chunks(block, degrees))
            shape, whole = llama(*LLAMA_8B, row["layers"]), llama(*LLAMA_8B, max(row.get("of_layers", 32), row["layers"]))
            missing = 16 * (whole.parameters - shape.parameters) / world
            size = (memory.of(shape, choice, row["local_tokens"]).peak + missing) / GIB
            what = f"{row['local_tokens']:,} tokens, {row['layers']} of {whole.layers} layers, {describe(choice)}"
            if row["outcome"] == "ok":
                yield Point("memory, one GPU", name, what, size, row["peak_gib"], "GiB", MEMORY_BAR, state=row["state_gib"])
            elif row["outcome"] == "out of memory":
                beyond = "ran out of memory: " + ("planned so" if refused(size, row["limit_gib"]) else "**not planned so**")
                yield Point("memory, one GPU", name, what, size, row["limit_gib"], "GiB", MEMORY_BAR, beyond)


def refused(size: float, limit: float) -> bool:
    """Whether the planner leaves out a choice of which it predicts this size, where the device has this limit (GiB)."""
    return size * search.MARGIN > limit - machines.RESERVE_GIB


def _real_ranks_memory() -> Iterator[Point]:
    for name, row in _steps():
        shape, choice = llama(*LLAMA_8B, 4), real_choice(row)
        found = memory.of(shape, choice, row["local_tokens"])
        what = f"{row['local_tokens']:,} tokens, {describe(choice)}"
        yield Point("memory, one GPU", name, what, found.peak / GIB, row["peak_gib"], "GiB", MEMORY_BAR)


def _trainer_memory() -> Iterator[Point]:
    for row, shape, choice in _trained():
        beyond = FITTED if shape.linear else ""
        peak = memory.of(shape, choice, row["tokens"] // choice.degrees.size).peak / GIB
        yield Point("memory, one GPU", TRAINER, _of_trainer(row, choice), peak, row["peak_gib"], "GiB", MEMORY_BAR, beyond)


def _trained() -> Iterator[tuple[dict[str, Any], Shape, Choice]]:
    """Runs of the HF Trainer over two GPUs. The peak of a packed row is that of a whole one, its time is not."""
    for row in read(TRAINER)["rows"]:
        if row["name"] != "packed":
            config = CONFIG_MAPPING[row["model_type"]](vocab_size=BYTE_VOCABULARY, **row["config_overrides"])
            yield row, shape_of(config), Choice(Topology(row["ulysses"], row["ring"], 1), stage=3)


def _of_trainer(row: dict[str, Any], choice: Choice) -> str:
    layers = row["config_overrides"]["num_hidden_layers"]
    return f"{row['model_type']}, {layers} layers, {row['tokens']:,} tokens, {describe(choice)}, HF Trainer"


def _steps() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in sorted(path.name for path in DATA.glob("h*_real_ranks*.json")):
        for row in _ours(read(name)["rows"]):
            if row.get("section") == "step" and "seconds" in row:
                yield name, row


def real_choice(row: dict[str, Any]) -> Choice:
    degrees, block = Topology(row["ulysses"], row["ring"], 1), row.get("block") or {}
    return Choice(
        degrees,
        stage=3,
        activation_offload=block.get("activation_offload", False),
        tiled_mlp=block.get("tiled_mlp", False),
        head_chunks=_chunks(block, degrees),
    )


# Time and traffic


def time_points() -> Iterator[Point]:
    yield from _one_rank_time()
    yield from _offload_time()
    yield from _real_ranks_time()
    yield from _trainer_time()
    yield from _longest_time()
    yield from _ring_time()
    yield from _loss_time()
    yield from _delta_time()
    yield from _link()


def _one_rank_time() -> Iterator[Point]:
    for name in sorted(path.name for path in DATA.glob("h*_one_rank_*.json")):
        for row in _ours(read(name)["rows"]):
            shape, choice = llama(*LLAMA_8B, row["layers"]), one_rank_choice(row)
            where = device(read(name)["machine"].get("device") or name.upper(), row["world"])
            found = _times(shape, choice, where, row["local_tokens"])
            seconds = sum(found.compute.values())  # there is no network in it
            what = f"{row['local_tokens']:,} tokens, {describe(choice)}"
            yield Point("time, a whole step", name, what, seconds, row["seconds"], "s", TIME_BAR)


def _offload_time() -> Iterator[Point]:
    found = read("h200_offload_trace.json")
    for row in found["rows"]:
        shape, offload = llama(*LLAMA_8B, row["layers"]), row["activation_offload"]
        choice = Choice(Topology(8, 1, 1), 3, activation_offload=offload, head_chunks=4 if offload else 1)
        expected = _times(shape, choice, device("NVIDIA H200", 8), row["local_tokens"])
        seconds = sum(expected.compute.values()) + expected.waits["host copies"]
        what = f"{row['local_tokens']:,} tokens, {row['layers']} layers, {describe(choice)}"
        yield Point("time, a whole step", "h200_offload_trace.json", what, seconds, row["seconds"], "s", TIME_BAR)


def _times(shape: Shape, choice: Choice, where: Machine, tokens: int) -> times.Times:
    pairs = times.busiest(shape, choice.degrees, (0, tokens * choice.degrees.size))
    return times.of(shape, choice, where, traffic.of(shape, choice, where, tokens), tokens, pairs)


def _real_ranks_time() -> Iterator[Point]:
    for name, row in _steps():
        shape, choice = llama(*LLAMA_8B, 4), real_choice(row)
        found = _times(shape, choice, device(row["device"], choice.degrees.size), row["local_tokens"])
        what = f"{row['local_tokens']:,} tokens, {describe(choice)}, over NVLink"
        yield Point("time, a whole step", name, what, found.seconds, row["seconds"], "s", TIME_BAR)


def _trainer_time() -> Iterator[Point]:
    for row, shape, choice in _trained():
        where = device("NVIDIA H200", choice.degrees.size)
        seconds = _times(shape, choice, where, row["tokens"] // choice.degrees.size).seconds
        what = f"{_of_trainer(row, choice)}, over NVLink"
        yield Point("time, a whole step", TRAINER, what, seconds, row["seconds"], "s", TIME_BAR)


def _longest_time() -> Iterator[Point]:
    beyond = "one step only, the first of its length: allocates pinned memory and marks every part"
    for name in sorted(path.name for path in DATA.glob("h*_memory*.json")):
        for row in read(name)["rows"]:
            if row.get("name") != "ds_cp ulysses" or row["outcome"] != "ok":
                continue
            degrees = Topology(8, 1, 1)
            choice = Choice(degrees, 3, activation_offload=True, tiled_mlp=True, head_chunks=4)
            shape = replace(llama(*LLAMA_8B, row["layers"]), windows=(row["window"] or None,) * row["layers"])
            found = _times(shape, choice, device(read(name)["machine"]["device"], 8), row["local_tokens"])
            seconds = sum(found.compute.values()) + found.waits["host copies"]
            what = f"{row['local_tokens']:,} tokens, {row['layers']} layers, {describe(choice)}"
            yield Point("time, a whole step", name, what, seconds, row["seconds"], "s", TIME_BAR, beyond)


NAMES = ("h200_ring", "h200_ring_short", "h200_attention_lengths", "h200_attention_head256", "h200_ring_1048576", "h100_ring")
RINGS = tuple(f"{name}.json" for name in NAMES)


def _ring_time() -> Iterator[Point]:
    """Forward and backward of one layer's attention, one rank of a ring: hops are copies."""
    for name in RINGS:
        found = read(name)
        for row in found["rows"]:
            if row.get("section") != "speed" or row["kernel"] != "flash_attn" or row["contender"] not in ("whole row", "ring p2p"):
                continue
            (heads, kv_heads), size = found["machine"]["arguments"]["heads"], found["machine"]["arguments"]["size"]
            shape = llama(heads * size, 1, 1, heads, kv_heads, size, 1)
            choice = Choice(Topology(1, row["ring"], 1), 3, checkpointing=False)
            pairs = times.busiest(shape, choice.degrees, (0, row["tokens"]))
            milliseconds = 1e3 * times.attention_seconds(shape, choice, device(found["machine"]["gpu"], row["ring"]), pairs)
            what = f"{row['tokens']:,} tokens, ring {row['ring']}, heads of {size}"
            local = row["tokens"] // row["ring"]
            beyond = f"{local:,} local tokens: launches of the host, and the first case of its process" if local < 2500 else ""
            yield Point("time, attention of a layer", name, what, milliseconds, row["total_ms"], "ms", TIME_BAR, beyond)


def _loss_time() -> Iterator[Point]:
    """The head and the loss, forward and backward; `whole logits` is HF's own."""
    for name in ("h200_loss.json", "h100_loss.json"):
        found = read(name)
        for row in found["rows"]:
            if row["contender"] in ("whole logits", "ds_cp, loss_chunk auto"):
                choice = Choice(Topology(8, 1, 1), 3, tiled_loss=row["contender"] != "whole logits")
                expected = _times(llama(*LLAMA_8B, 1), choice, device(found["machine"]["device"], 8), row["tokens"])
                what = f"{row['tokens']:,} tokens, vocabulary {row['vocabulary']:,}, {row['contender']}"
                yield Point("time, head and loss", name, what, expected.compute["head and loss"], row["seconds"], "s", TIME_BAR)


def _delta_time() -> Iterator[Point]:
    """A Gated DeltaNet layer's recurrence and convolution, forward and backward, whole or by heads."""
    for name in ("h200_delta_heads.json", "h100_delta_heads.json"):
        found = read(name)
        given = found["machine"]["arguments"]
        layer = Linear(given["heads"][1], given["heads"][0], given["size"], given["size"])
        for row in found["rows"]:
            if row["contender"] not in ("whole", "heads"):
                continue
            shape = replace(llama(*LLAMA_8B, 1), linear=(layer,))
            choice = Choice(Topology(row["ranks"], 1, 1), 3, checkpointing=False)
            expected = _times(shape, choice, device(found["machine"]["gpu"], 8), given["tokens"] // row["ranks"])
            what = f"{given['tokens']:,} tokens, {given['heads'][1]} value heads over {row['ranks']}"
            beyond = "two heads of the row a rank: launches of the host" if row["ranks"] == 16 else ""
            milliseconds = 1e3 * expected.compute["DeltaNet"]
            yield Point("time, a DeltaNet layer", name, what, milliseconds, row["total_ms"], "ms", TIME_BAR, beyond)


LINK = {"ulysses 4": (4, 1), "ulysses 2 x ring 2": (2, 2), "ring 4": (1, 4)}


def _link() -> Iterator[Point]:
    """Two hosts of two CPU ranks: what they send, and the step at 100 Mbit/s from that at 1 Gbit/s."""
    found = read("link.json")
    slow, fast = Link("100 Mbit/s", 0.0125, 0.0, shared=True), Link("1 Gbit/s", 0.125, 0.0, shared=True)
    shape = llama(256, 688, 1024, 8, 4, 32, 4)
    for name, (ulysses, ring) in LINK.items():
        choice, by_rate = Choice(Topology(ulysses, ring, 1), 3, checkpointing=False), {}
        for link in (slow, fast):
            where = Machine(4, 2, machines.GPUS[0], Link("memory", 1e3, 0.0), link, 0)
            by_rate[link.name] = traffic.of(shape, choice, where, found["tokens"] // 4, element=4)
        rows = {row["rate"]: row for row in found["rows"] if row["contender"] == name}
        sent = by_rate[slow.name].leaves / 1e6
        yield Point("traffic, what a host sends", "link.json", name, sent, rows["100mbit"]["sent_mb"], "MB", TRAFFIC_BAR)
        more = by_rate[slow.name].leaves / 1e9 * (1 / slow.gb_per_s - 1 / fast.gb_per_s)
        predicted = rows["1gbit"]["seconds"] + more
        what = f"{name}, 100 Mbit/s from the step at 1 Gbit/s"
        yield Point("time, shaped link", "link.json", what, predicted, rows["100mbit"]["seconds"], "s", TIME_BAR)


def points() -> list[Point]:
    return [*memory_points(), *time_points()]


def table(found: list[Point]) -> str:
    """Markdown, a section for each kind of figure."""
    lines = []
    for section in dict.fromkeys(point.section for point in found):
        mine = [point for point in found if point.section == section]
        held = [point for point in mine if not point.beyond]
        good = sum(abs(point.error) <= point.bar for point in held)
        worst = max((abs(point.error) for point in held), default=0.0)
        steps = [abs(point.of_the_step) for point in held if point.of_the_step is not None]
        rest = f"; of what a step adds to the state, where that was measured, the worst {max(steps):.1%}" if steps else ""
        rest += f"; {len(mine) - len(held)} more are not held to it" if len(mine) > len(held) else ""
        lines += [f"### {section[0].upper()}{section[1:]}", ""]
        lines += [f"{good} of {len(held)} within {mine[0].bar:.0%}, the worst {worst:.1%}{rest}.", ""]
        lines += ["| data | case | predicted | measured | error | |", "| --- | --- | --- | --- | --- | --- |"]
        for point in mine:
            mark = point.beyond or ("" if abs(point.error) <= point.bar else "**missed**")
            figures = f"{point.predicted:.4g} {point.unit} | {point.measured:.4g} | {point.error:+.1%}"
            lines.append(f"| [{point.file}](data/{point.file}) | {point.what} | {figures} | {mark} |")
        lines.append("")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="put the tables into this file, after the line that says so")
    return parser.parse_args()


def main() -> None:
    args, found = parse(), table(points())
    if args.write:
        before = args.write.read_text(encoding="utf-8").split(MARK)[0]
        args.write.write_text(before + MARK + "\n\n" + found, encoding="utf-8")
    else:
        print(found)


if __name__ == "__main__":
    main()

"""Draws the figures of docs/concepts.md into docs/figures/*.svg from ds_cp's own plans; `--check` only compares.

What a figure shows is computed by the functions that a run calls (layouts, tiles, head splits, groups, losses), on integers small
enough to be drawn. A test compares the files with what this script writes, and the plans with what they have to be.

    python scripts/gen_figures.py
    python scripts/gen_figures.py --check
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.sax.saxutils import escape

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ds_cp import balance, explain, layout, placement, reshard, tiles, topology  # noqa: E402 (the package beside this script)
from ds_cp.kernels import delta  # noqa: E402
from ds_cp.loss import CausalLMLoss  # noqa: E402
from ds_cp.mesh import AxisGroup, Mesh  # noqa: E402

TARGET = ROOT / "docs" / "figures"
RING = 4
ONE, PACKED = (4096,), (2048, 512, 512, 256, 256, 256, 128, 128)
STEP_TOKENS, STEP_DOCUMENTS = 32, (0, 20, 32)
HEADS = 8, 2
"""Query and key/value heads of the exchange."""
VALUE_HEADS, KEY_HEADS = 4, 2
DEGREES = topology.Topology(ulysses=2, ring=2, data=1)
JOB = {"size": 8, "world": 16, "local_world": 4, "heads": [(32, 8)]}
TARGETS = (((3, 1), (4, 4)), ((2, 0), (5, 1)))
"""Targets of each rank of each micro-batch of each replica."""
COLOURS = ("#f4b183", "#9dc3e6", "#a9d18e", "#ffd966", "#c9a6e4", "#e79aa8", "#8fd3cf", "#c9c9c9")
BLACK, GREY = "#222222", "#777777"


@dataclass
class Svg:
    """Rectangles and words on white."""

    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"'
            + (f' stroke="{stroke}"' if stroke != "none" else "")
            + "/>"
        )

    def text(self, x: float, y: float, words: str, size: int = 12, anchor: str = "start", colour: str = BLACK) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'
        )

    def cell(self, x: float, y: float, width: float, height: float, fill: str, words: str, size: int = 12) -> None:
        self.box(x, y, width, height, fill, "white")
        self.text(x + width / 2, y + height / 2 + size * 0.36, words, size, "middle")

    def render(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" font-family="sans-serif">\n<rect width="100%" height="100%" fill="white"/>\n'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def layouts() -> list[tuple[str, explain.Explained]]:
    """(title, row): one document and a packed row under the layouts."""
    return [
        ("contiguous, one document", explain.explain("contiguous", ONE, RING)),
        ("zigzag, one document", explain.explain("zigzag", ONE, RING)),
        ("zigzag, packed documents", explain.explain("zigzag", PACKED, RING)),
        ("balanced, the same documents", explain.explain("balanced", PACKED, RING)),
    ]


def draw_layouts() -> Svg:
    svg = Svg(900, 4 * 92 + 10)
    for number, (title, row) in enumerate(layouts()):
        y, wide = 92 * number + 20, 560
        svg.text(10, y, f"{title}: who holds which chunk", 13)
        owner = balance.owners(row.layout.chunks)
        for chunk, rank in enumerate(owner):
            svg.cell(10 + chunk * wide / len(owner), y + 8, wide / len(owner), 26, COLOURS[rank], str(rank))
        for start, end in pairwise(row.documents):
            scale = wide / row.layout.length
            svg.box(10 + start * scale + 1, y + 38, (end - start) * scale - 2, 7, GREY)
        svg.text(600, y, "work of each ring rank / mean", 12)
        mean = sum(row.work) / RING
        for rank, pairs in enumerate(row.work):
            svg.box(600, y + 8 + 13 * rank, 100 * pairs / mean, 12, COLOURS[rank])
            svg.text(604, y + 18 + 13 * rank, f"{rank}: {pairs / mean:.2f}", 10)
    return svg


def attended() -> Iterator[tuple[int, int, int, int, int]]:
    """(ring rank, step, query, first key, end of keys) in tokens of the row, of every tile of a ring's steps."""
    plan = layout.build("zigzag", STEP_TOKENS, RING, 1, STEP_DOCUMENTS)
    for rank in range(RING):
        queries = _tokens(plan.ring_ranges(rank))
        for step, found in enumerate(tiles.plan(plan, rank, STEP_DOCUMENTS).steps):
            keys = _tokens(plan.ring_ranges((rank - step) % RING))
            for tile in found:
                for local in range(tile.q_start, tile.q_end):
                    for first, end in _runs([keys[k] for k in _keys_of(tile, local)]):
                        yield rank, step, queries[local], first, end


def _keys_of(tile: tiles.Tile, query: int) -> range:
    """The keys that a local query attends in a tile, as local numbers."""
    if tile.documents is None:
        return range(tile.k_start, tile.k_end)
    start = max(bound for bound in tile.documents if bound <= query - tile.q_start)
    return range(tile.k_start + start, tile.k_start + query - tile.q_start + 1)


def _tokens(spans: Sequence[layout.Range]) -> list[int]:
    return [token for start, end in spans for token in range(start, end)]


def _runs(tokens: Sequence[int]) -> list[layout.Range]:
    """Ascending tokens as ranges."""
    starts = [i for i, token in enumerate(tokens) if i == 0 or token != tokens[i - 1] + 1]
    ends = [*starts[1:], len(tokens)]
    return [(tokens[start], tokens[end - 1] + 1) for start, end in zip(starts, ends, strict=True)]


def draw_ring_step() -> Svg:
    svg, cell, wide = Svg(920, 290), 6, 224
    plan = layout.build("zigzag", STEP_TOKENS, RING, 1, STEP_DOCUMENTS)
    owner = balance.owners(plan.chunks)
    for step in range(RING):
        x, y = 18 + step * wide, 44
        svg.text(x, 16, f"step {step}: keys of rank {'r, its own' if step == 0 else f'r - {step}'}")
        svg.text(x, 32, "columns: keys; rows: queries", 10, colour=GREY)
        svg.box(x, y, cell * STEP_TOKENS, cell * STEP_TOKENS, "#f3f3f3")
        for token in range(STEP_TOKENS):
            colour = COLOURS[owner[token // plan.chunk]]
            svg.box(x + cell * token, y - 5, cell, 4, colour)
            svg.box(x - 5, y + cell * token, 4, cell, colour)
    for rank, step, query, first, end in attended():
        svg.box(18 + step * wide + cell * first, 44 + cell * query, cell * (end - first), cell, COLOURS[rank])
    for rank in range(RING):
        svg.box(18 + 90 * rank, 250, 12, 12, COLOURS[rank])
        svg.text(34 + 90 * rank, 260, f"ring rank {rank}")
    reach = tiles.plan(plan, 0, STEP_DOCUMENTS).reach
    svg.text(
        18, 280, f"Hops that the block of rank 0, 1, 2, 3 makes: {', '.join(map(str, reach))}. Two documents: 0-19 and 20-31.", 12
    )
    return svg


def heads_of(ranks: int, query: int, kv: int) -> list[tuple[list[int], list[int]]]:
    """(query heads, key/value heads) that each rank of an exchange works on."""
    split = topology.split_heads(ranks, query, kv)
    found = []
    for heads in (query, kv):
        numbers = torch.arange(heads)[None, :, None]
        groups = reshard.by_receiver(numbers, ranks // split.sharing, split.sharing).flatten(0, 1)
        found.append([groups[rank % len(groups)].flatten().tolist() for rank in range(ranks)])
    return list(zip(*found, strict=True))


def draw_ulysses() -> Svg:
    ranks = 4
    svg, after = Svg(920, 250), heads_of(ranks, *HEADS)
    spans = layout.shards(layout.build("contiguous", STEP_TOKENS, 1, ranks))
    for x, name, (query, kv) in ((20, "before: some tokens, all heads", HEADS), (480, "after: all tokens, some heads", (8, 4))):
        svg.text(x, 18, name, 13)
        svg.text(x, 38, "query heads", 11, colour=GREY)
        svg.text(x + 30 * query + 20, 38, "key/value heads", 11, colour=GREY)
        for kind, heads in enumerate((query, kv)):
            left = x + kind * (30 * query + 20)
            for rank in range(ranks):
                if x == 20:
                    for head in range(heads):
                        y, end = (46 + 4.5 * spans[rank][0][side] for side in (0, 1))
                        svg.cell(left + 30 * head, y, 30, end - y, COLOURS[rank], str(head))
                else:
                    mine = after[rank][kind]
                    for place, head in enumerate(mine):
                        svg.cell(left + 30 * (rank * len(mine) + place), 46, 30, 4.5 * STEP_TOKENS, COLOURS[rank], str(head))
    svg.text(8, 120, "t", 11, colour=GREY)
    svg.text(430, 122, "->", 20)
    for rank in range(ranks):
        svg.box(20 + 120 * rank, 212, 12, 12, COLOURS[rank])
        svg.text(36 + 120 * rank, 222, f"ulysses rank {rank}")
    svg.text(20, 242, "Numbers are heads. With fewer key/value heads than ranks each goes to every rank that needs it.")
    return svg


def mesh_of(rank: int) -> Mesh:
    """DEGREES as rank sees them; there are no processes."""
    axes = {}
    for axis in topology.AXES:
        ranks = next(group for group in DEGREES.groups(axis) if rank in group)
        axes[axis] = AxisGroup(group=None, ranks=tuple(ranks), rank=ranks.index(rank))
    return Mesh(topology=DEGREES, **axes)


def placed(linear: str) -> list[tuple[placement.Held, list[layout.Range], list[int]]]:
    """Of each rank: what it holds; the tokens and the value heads that it works on in a Gated DeltaNet layer."""
    plan = layout.build("zigzag", STEP_TOKENS, DEGREES.ring, DEGREES.ulysses)
    methods: Any = placement.Methods(attention=None, layout="zigzag", delta=delta.load("reference"), linear=linear)
    found = []
    for rank in range(DEGREES.size):
        mesh = mesh_of(rank)
        held = placement.place(plan, methods, mesh, (0, STEP_TOKENS), torch.device("cpu"))
        passing = held.span is not None and held.span.passing is not None
        axis = mesh.ulysses if passing else mesh.seq
        tokens = list(held.layout.ring_ranges(mesh.ring.rank)) if passing else [(0, STEP_TOKENS)]
        assert held.to_delta is not None
        assert sum(held.to_delta.counts[1]) == sum(end - start for start, end in tokens)
        found.append((held, tokens, heads_of(axis.size, VALUE_HEADS, KEY_HEADS)[axis.rank][0]))
    return found


def draw_deltanet() -> Svg:
    svg, cell = Svg(920, 330), 12
    for number, linear in enumerate(("heads", "state")):
        y = 24 + 152 * number
        ranks = placed(linear)
        svg.text(20, y, f"{linear}: tokens that a rank holds", 13)
        svg.text(490, y, "value heads x tokens in a Gated DeltaNet layer", 13)
        for rank, (held, tokens, heads) in enumerate(ranks):
            u, r, _ = DEGREES.coordinates(rank)
            svg.text(20, y + 24 + 26 * rank, f"rank {rank}", 11)
            for start, end in held.layout.local_ranges(r, u):
                svg.box(64 + cell * start, y + 10 + 26 * rank, cell * (end - start), 20, COLOURS[rank])
            for head in heads:
                for start, end in tokens:
                    svg.box(534 + 11 * start, y + 10 + 26 * head, 11 * (end - start) - 1, 20, COLOURS[rank])
        for head in range(VALUE_HEADS):
            svg.text(490, y + 24 + 26 * head, f"head {head}", 11)
            if linear == "state":
                svg.text(534 + 11 * STEP_TOKENS / 2, y + 25 + 26 * head, "state ->", 11, "middle")
    svg.text(
        20,
        322,
        "Row from left to right: natural order. ulysses 2 x ring 2, one document; with state, attention fetches zigzag order.",
    )
    return svg


def job() -> topology.Topology:
    """What "auto" makes of 8 ranks a row, on hosts of 4."""
    return topology.resolve(**JOB, ulysses="auto", ring="auto")


def draw_groups() -> Svg:
    found, per_host = job(), int(str(JOB["local_world"]))
    svg = Svg(920, 250)
    said: Mapping[str, str] = {"ulysses": "all-to-all", "ring": "keys, values", "seq": "one row", "data": "replicas"}
    for host in range(found.world // per_host):
        svg.text(150 + 46 * per_host * (host + 0.5), 16, f"host {host}", 12, "middle")
        svg.box(150 + 46 * per_host * host, 22, 46 * per_host - 4, 182, "#efefef")
    for number, axis in enumerate(topology.AXES):
        y = 30 + 34 * number
        svg.text(10, y + 18, f"{axis}: {said[axis]}")
        for colour, group in enumerate(found.groups(axis)):
            for rank in group:
                svg.cell(152 + 46 * rank, y, 42, 26, COLOURS[colour % len(COLOURS)], str(rank))
    svg.text(10, 184, "ZeRO (DeepSpeed)")
    for rank in range(found.world):
        svg.cell(152 + 46 * rank, 166, 42, 26, "#ffffff", str(rank))
    svg.text(
        10,
        226,
        f"ulysses {found.ulysses} x ring {found.ring} x {found.data} replicas. Ranks of one colour in a line are one group.",
    )
    svg.text(10, 244, "ZeRO splits states over all ranks, and averages gradients over all of them.")
    return svg


def weights(reduction: Any) -> list[list[Fraction]]:
    """What one target's gradient counts in the reduced gradient, by replica and micro-batch: ds_cp's factor over W x divisor."""
    replicas, steps, size = len(TARGETS), len(TARGETS[0]), len(TARGETS[0][0])
    degrees = topology.Topology(ulysses=size, ring=1, data=replicas)
    items = sum(sum(map(sum, row)) for row in TARGETS)
    loss = CausalLMLoss(reduction=reduction, divisor=lambda: steps)
    found = []
    for replica in TARGETS:
        found.append([])
        for micro_batch in replica:
            local = torch.ones((), dtype=torch.float64, requires_grad=True)
            mesh = SimpleNamespace(topology=degrees, seq=SimpleNamespace(group=None))
            cp: Any = SimpleNamespace(mesh=mesh, targets=torch.tensor(float(sum(micro_batch))), weights=None)
            loss(local, local, cp=cp, local=local, num_items_in_batch=items).backward()
            factor = Fraction(float(local.grad)) / (degrees.world * steps)
            found[-1].append(factor.limit_denominator(1000))
    return found


def draw_loss() -> Svg:
    svg, reductions = Svg(920, 250), ("mean", "token_mean", "sum")
    svg.text(10, 18, "micro-batch: targets of its two ranks")
    for column, reduction in enumerate(reductions):
        svg.text(480 + 140 * column, 18, reduction, 13, "middle")
    found = {reduction: weights(reduction) for reduction in reductions}
    line = 0
    for replica, row in enumerate(TARGETS):
        for step, micro_batch in enumerate(row):
            y = 30 + 42 * line
            svg.text(10, y + 20, f"replica {replica}, step {step}")
            for rank, count in enumerate(micro_batch):
                svg.cell(150 + 90 * rank, y, 86, 32, COLOURS[rank], f"{count} targets")
            for column, reduction in enumerate(reductions):
                svg.cell(420 + 140 * column, y, 120, 32, "#efefef", str(found[reduction][replica][step]))
            line += 1
    svg.text(10, 216, "Right: what one target's gradient counts in the gradient that the optimizer sees.")
    items = sum(sum(map(sum, row)) for row in TARGETS)
    svg.text(10, 234, f"{items} targets in the global batch: 2 replicas x 2 accumulation steps x 2 ranks a row.")
    return svg


FIGURES: Mapping[str, Callable[[], Svg]] = {
    "layouts": draw_layouts,
    "ring_step": draw_ring_step,
    "ulysses": draw_ulysses,
    "deltanet": draw_deltanet,
    "groups": draw_groups,
    "loss": draw_loss,
}


def main() -> int:
    stale = []
    for name, draw in FIGURES.items():
        path, text = TARGET / f"{name}.svg", draw().render()
        if "--check" not in sys.argv[1:]:
            TARGET.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
    if stale:
        print(f"{', '.join(stale)}: not what the code draws; run python scripts/gen_figures.py")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())

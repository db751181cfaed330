"""Who holds what of a row, the work of every ring rank, and what each hop carries: as a table in the shell, and as a picture.

row     | document 0         | document 1 | ...          colour: the ring rank that holds the chunk
cost    pairs of a query and a key that each chunk's queries attend
ranks   work over the mean; kernel calls; what a rank receives at every step
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ds_cp import balance, tiles
from ds_cp import layout as layouts
from ds_cp.layout import Layout
from ds_cp.tiles import Plan

MOST_CELLS = 96
"""Characters of the strip that shows a row's chunks."""


@dataclass(frozen=True)
class Explained:
    """A row under a layout: `documents` with the padding, one plan a rank."""

    name: str
    layout: Layout
    documents: tuple[int, ...]
    padding: int
    plans: tuple[Plan, ...]

    @property
    def work(self) -> list[int]:
        return [sum(tile.pairs for step in plan.steps for tile in step) for plan in self.plans]

    @property
    def calls(self) -> list[int]:
        return [sum(map(len, plan.steps)) for plan in self.plans]

    @property
    def received(self) -> list[list[int]]:
        """Tokens whose keys and values each rank receives, by step; a window's halo comes in one."""
        ring, local = self.layout.ring, self.layout.length // self.layout.ring
        if any(plan.halo for plan in self.plans) or not self.plans[0].reach:
            return [[sum(b - a for _, a, b in plan.halo.received) if plan.halo else 0] for plan in self.plans]
        reach = self.plans[0].reach
        steps = range(max(reach))
        return [[local if step < reach[(rank - 1 - step) % ring] else 0 for step in steps] for rank in range(ring)]


def read_lengths(path: Path) -> list[int]:
    """Document lengths, whole numbers apart by blanks, commas or lines.

    Raises:
        ValueError: something else stands there, or nothing.
    """
    words = path.read_text(encoding="utf-8").replace(",", " ").split()
    wrong = next((word for word in words if not word.isdecimal() or int(word) < 1), None)
    if wrong is not None or not words:
        raise ValueError(f"{path}: expected lengths of documents, whole numbers from 1, got {wrong or 'nothing'!r}")
    return [int(word) for word in words]


def explain(name: str, lengths: Sequence[int], ring: int, ulysses: int = 1, window: int | None = None) -> Explained:
    documents = (0, *accumulate(lengths))
    plan = layouts.build(name, documents[-1], ring, ulysses, documents, (window,))
    whole = tuple(balance.padded(documents, plan.length))
    if window is None or window >= max(lengths):
        plans = [tiles.plan(plan, r, whole) for r in range(ring)]
    else:
        plans = [tiles.plan_window(plan, r, whole, window) for r in range(ring)]
    return Explained(layouts.resolve(name, documents), plan, whole, plan.length - documents[-1], tuple(plans))


def show(found: Explained, console: Console) -> None:
    plan, work, mean = found.layout, found.work, sum(found.work) / found.layout.ring
    real = len(found.documents) - 1 - (found.padding > 0)
    console.print(
        f"{found.name}: {plan.length:,} tokens ({found.padding} of padding), {real} documents, {plan.ring} ring ranks, "
        f"{len(plan.chunks[0])} chunks of {plan.chunk:,} tokens each"
    )
    console.print(f"ring rank of each chunk: {strip(plan)}", soft_wrap=True, highlight=False)
    table = Table("ring rank", "chunks", "work / mean", "", "kernel calls", "tokens received, by step")
    for rank, (pairs, calls, received) in enumerate(zip(work, found.calls, found.received, strict=True)):
        chunks = " ".join(map(str, plan.chunks[rank]))
        bar = "#" * round(20 * pairs / max(work))
        table.add_row(str(rank), chunks, f"{pairs / mean:.3f}", bar, str(calls), " ".join(f"{n:,}" for n in received) or "none")
    console.print(table)
    console.print(f"even (mean / busiest): {mean / max(work):.3f}")


def strip(plan: Layout) -> str:
    """The ranks of the chunks in the order of the row; the first ones, where there are many."""
    owner = [str(rank) for rank in balance.owners(plan.chunks)]
    shown = owner[: MOST_CELLS // (1 + max(map(len, owner)))]
    return " ".join(shown) + (f" ... ({len(owner)} chunks)" if len(shown) < len(owner) else "")


def draw(found: Explained, path: Path) -> None:
    """The same as a PNG.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("explain: --png needs matplotlib: pip install matplotlib") from error
    plan, owner = found.layout, balance.owners(found.layout.chunks)
    colours = [colormaps["turbo"](rank / max(plan.ring - 1, 1)) for rank in range(plan.ring)]
    cost = balance.Pairs(found.documents).of_chunks(plan.chunk, len(owner))
    figure = Figure(figsize=(10, 7), layout="constrained")
    row, each, ranks = figure.subplots(3, 1, height_ratios=(1, 2, 2))
    for chunk, rank in enumerate(owner):
        row.axvspan(chunk * plan.chunk, (chunk + 1) * plan.chunk, color=colours[rank])
    for start, _ in pairwise(found.documents):
        row.axvline(start, color="white", linewidth=0.8)
    row.set(xlim=(0, plan.length), yticks=[], xlabel="tokens; white lines: documents", title=f"{found.name}: who holds what")
    each.bar(range(len(owner)), cost, color=[colours[rank] for rank in owner])
    each.set(xlabel="chunk", ylabel="pairs, full attention")
    mean = sum(found.work) / plan.ring
    ranks.bar(range(plan.ring), [pairs / mean for pairs in found.work], color=colours)
    ranks.axhline(1, color="black", linewidth=0.8)
    received = [f"{sum(tokens):,}" for tokens in found.received]
    ranks.set(xlabel="ring rank; below, the tokens whose keys and values it receives", ylabel="work / mean")
    ranks.set_xticks(range(plan.ring), [f"{rank}\n{tokens}" for rank, tokens in enumerate(received)])
    figure.savefig(path, dpi=130)

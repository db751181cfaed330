"""The tokens that a rank fetches for a short convolution, all ranks of a row played in one process, against each document alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ds_cp import convolution, layout
from ds_cp.layout import Range
from ds_cp.mesh import AxisGroup

DOCUMENTS = {"one": [70], "packed": [13, 1, 1, 22, 5, 1, 25, 2], "single tokens": [1] * 9, "short": [2], "pairs": [2, 3, 2]}


def axes(ranks: int) -> list[AxisGroup]:
    return [AxisGroup(None, tuple(range(ranks)), rank) for rank in range(ranks)]


def played(shards: tuple[tuple[Range, ...], ...], bounds: tuple[int, ...], width: int, x_SC: Tensor, weight: Tensor) -> Tensor:
    """The convolution of the whole row by all ranks, whose messages are handed over here."""
    cpu = torch.device("cpu")
    halos = [convolution.plan(shards, bounds, width, axis, cpu) for axis in axes(len(shards))]
    held = [torch.cat([x_SC[start:end] for start, end in spans]) for spans in shards]
    messages = [x[halo.sent].split(halo.counts[0]) for x, halo in zip(held, halos, strict=True)]
    out_SC = torch.full_like(x_SC, torch.nan)
    for rank, (spans, halo) in enumerate(zip(shards, halos, strict=True)):
        arrived = [theirs[rank] for theirs in messages]
        assert [len(part) for part in arrived] == halo.counts[1]
        padded = x_SC.new_zeros(halo.rows, x_SC.shape[1])
        padded[halo.at_T] = held[rank]
        assert not (padded[halo.fetched] != 0).any(), "what is fetched has a place of its own"
        padded[halo.fetched] = torch.cat(arrived)
        mixed = functional.conv1d(padded.T[None], weight, groups=len(weight))[0].T
        taken = weight.shape[-1] - 1
        out_SC[torch.cat([torch.arange(start, end) for start, end in spans])] = convolution.own(mixed, halo, taken)
    return out_SC


@pytest.mark.parametrize("width", [1, 2, 6])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("name", ["zigzag", "balanced", "contiguous"])
@pytest.mark.parametrize(("ulysses", "ring"), [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (4, 2)])
def test_every_layout_gives_each_document_what_it_has_alone(ulysses: int, ring: int, name: str, documents: str, width: int) -> None:
    lengths = DOCUMENTS[documents]
    bounds = (0, *torch.tensor(lengths).cumsum(0).tolist())
    plan = layout.build(name, bounds[-1], ring, ulysses, bounds)
    bounds = bounds if bounds[-1] == plan.length else (*bounds, plan.length)
    generator = torch.Generator().manual_seed(1)
    x_SC = torch.randn(plan.length, 3, generator=generator, dtype=torch.float64)
    for taps in (width + 1, width):  # one with fewer taps than the halo is wide
        weight = torch.randn(3, 1, taps, generator=generator, dtype=torch.float64)
        parts = [functional.pad(x_SC[start:end].T[None], (taps - 1, 0)) for start, end in pairwise(bounds)]
        wanted = torch.cat([functional.conv1d(part, weight, groups=3)[0].T for part in parts])
        got = played(layout.shards(plan), bounds, width, x_SC, weight)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "pieces"), [("contiguous", 1), ("zigzag", 2)])
def test_what_is_fetched_does_not_grow_with_the_row(name: str, pieces: int) -> None:
    for tokens in (4096, 65536):
        plan = layout.build(name, tokens, 8, 1)
        halos = [convolution.plan(layout.shards(plan), (0, tokens), 3, axis, torch.device("cpu")) for axis in axes(8)]
        assert [sum(halo.counts[1]) for halo in halos[1:-1]] == [3 * pieces] * 6
        assert sum(sum(halo.counts[0]) for halo in halos) == sum(sum(halo.counts[1]) for halo in halos)

"""How layers are computed, and what ranks hold: a row's distribution outside attention and the ways from it into the layers.

    attention in zigzag order, no recurrent layers, or their heads over all ranks    ranks hold what attention works on
    state passed along the ring                                                      consecutive pieces; attention fetches its own

The distribution is thus a property of a kind of layer, and nothing is moved but inside the exchanges that those layers make anyway.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ds_cp import comm, convolution
from ds_cp import layout as layouts
from ds_cp.balance import Window
from ds_cp.kernels import delta as deltas
from ds_cp.layout import Layout, Route
from ds_cp.mesh import Mesh

if TYPE_CHECKING:
    from ds_cp.kernels.attention import Kernel


@dataclass(frozen=True)
class Methods:
    """How layers are computed: what "auto" became, resolved once for a run."""

    attention: Kernel
    layout: str
    """A layout of `ds_cp.layout`; "auto" goes by each row's documents."""
    ring_impl: Literal["auto", "p2p", "allgather"] = "p2p"
    """Keys and values go from rank to rank, or are gathered at once; "auto" goes by each row."""
    gathered_tokens: int = 0
    """Of "auto": a row of one document is gathered where a ring rank has at most so many tokens of it."""
    beside: torch.cuda.Stream | None = None
    """A second stream for the kernels of neighbouring ring steps; None: one after another."""
    delta: deltas.Kernel | None = None
    """None for a model without Gated DeltaNet layers."""
    linear: Literal["heads", "state"] = "heads"
    """How those layers are sharded: heads over all ranks of a row, or heads over ulysses and state passed along the ring."""
    windows: tuple[Window, ...] = (None,)
    """Of every attention layer: how many keys a query attends, its own included; a chunk's; None for all before it."""
    head_chunks: int = 1
    """Groups of a rank's query heads that go through the all-to-all one after another."""
    ring_keep: Literal["always", "checkpointing", "never"] = "never"
    """Whether other ranks' keys and values wait for backward instead of being sent again; or only where layers are checkpointed."""
    scans: bool = False
    """The model has other recurrent layers, whose heads are shared out as those of DeltaNet layers may be."""
    halo: int = 0
    """Tokens before its own that a token sees in the model's short convolutions."""


@dataclass(frozen=True)
class Held:
    """What ranks hold outside attention, and the way from there into the layers that mix tokens."""

    layout: Layout
    to_attention: Route | None
    """Over `seq`; None where ranks hold what attention works on."""
    to_delta: Route | None
    """Over the ranks that share the heads of a recurrent layer; None for one rank or a model without any."""
    span: deltas.Span | None
    """What such a layer's kernel works on."""
    halo: convolution.Halo | None = None
    """Of short convolutions; None for a model without."""


def place(plan: Layout, methods: Methods, mesh: Mesh, documents: tuple[int, ...], device: torch.device) -> Held:
    """What this rank holds of a row, for attention under the layout `plan`.

    Args:
        documents: cu_seqlens of the padded row. device: where kernels read boundaries.
    """
    ring, ulysses = mesh.ring, mesh.ulysses
    pieces = methods.delta is not None and methods.linear == "state" and ring.size > 1
    held = layouts.build("contiguous", plan.length, ring.size, ulysses.size) if pieces else plan
    to_attention = None
    if held != plan:
        worked = [plan.ring_ranges(r) for r in range(ring.size) for _ in range(ulysses.size)]
        to_attention = layouts.route(layouts.shards(held), worked, mesh.seq.rank)
    halo = None
    if methods.halo:
        halo = convolution.plan(layouts.shards(held), documents, methods.halo, mesh.seq, device)
    if methods.delta is None and not methods.scans:
        return Held(layout=held, to_attention=to_attention, to_delta=None, span=None, halo=halo)
    if not pieces:
        row = [((0, plan.length),)] * mesh.seq.size
        span = deltas.Span(documents)
        to_delta = layouts.route(layouts.shards(held), row, mesh.seq.rank) if mesh.seq.size > 1 else None
    else:
        span = deltas.piece(documents, ring.rank, ring.size, partial(comm.all_gather, group=ring.group, waits=ring.waits))
        group = [held.local_ranges(ring.rank, u) for u in range(ulysses.size)]
        to_delta = layouts.route(group, [held.ring_ranges(ring.rank)] * ulysses.size, ulysses.rank) if ulysses.size > 1 else None
    if device.type != "cpu":
        span = replace(span, cu_seqlens=bounds_on(device, span.documents, torch.int64))
    return Held(layout=held, to_attention=to_attention, to_delta=to_delta, span=span, halo=halo)


def bounds_on(device: torch.device, documents: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """cu_seqlens on a device, without waiting for it."""
    return torch.tensor(documents, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)

"""Seconds of a training step, by part.

    compute   matrix products and attention at the speeds that one GPU reached; norms, residuals, rotary positions and copies around
              the all-to-all by the bytes that they move; a ring's step no faster than its launches
    network   all-to-alls stand still for; hops hide behind the step's attention; ZeRO's collectives hide behind all other compute;
              copies of layer inputs to the host and back hide behind compute

Passes over a layer: forward, once more where it is checkpointed, and backward, which is two; an MLP in tiles once more again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ds_cp import balance
from ds_cp.planner import machine as machines
from ds_cp.planner.choice import Choice
from ds_cp.planner.machine import Machine
from ds_cp.planner.shape import Shape
from ds_cp.planner.traffic import Traffic
from ds_cp.topology import Topology

Pairs = Mapping[int | None, float]
"""By window; None: full attention."""

LAYER_BYTES = 760.0
"""Moved by a checkpointed layer outside matrix products and attention, for each element of the hidden size of a token (fitted)."""
EXCHANGE_BYTES = 200.0
"""The same for the copies around all-to-alls (fitted)."""
NORM_TILES = 1.3
OPTIMIZER_BYTES = 260.0
"""Moved by AdamW for each parameter (fitted to torch's foreach form)."""
STEP_S, LAUNCH_S = 40e-6, 150e-6
"""A ring's step costs so much beside its kernels, and is no shorter than its launches, in one direction."""
DELTA_S = (3.6e-9, 9.7e-9)
"""Of a Gated DeltaNet layer, a token and a value head of 128: forward and backward (one H200, heads over 2 and 4 ranks)."""
WHOLE_LOGITS = 1.12
"""Time of whole logits over that of tiles."""


@dataclass(frozen=True)
class Times:
    compute: dict[str, float]
    waits: dict[str, float]
    """What the network and the host add that nothing hides."""

    @property
    def seconds(self) -> float:
        return sum(self.compute.values()) + sum(self.waits.values())


def of(shape: Shape, choice: Choice, machine: Machine, traffic: Traffic, tokens: int, pairs: Pairs) -> Times:
    """Of a step with one row a replica.

    Args:
        tokens: of this rank. pairs: of the busiest ring rank, from `busiest`.
    """
    gpu, passes, head = machine.gpu, 4.0 if choice.checkpointing else 3.0, shape.vocabulary * shape.hidden
    attention = attention_seconds(shape, choice, machine, pairs)
    compute = {
        "attention": attention,
        "MLP": 2.0 * shape.mlp * tokens * (passes + choice.tiled_mlp) / gpu.mlp / 1e12,
        "projections": 2.0 * shape.mixers * tokens * passes / gpu.projections / 1e12,
        "head and loss": (1.0 if choice.tiled_loss else WHOLE_LOGITS) * 6.0 * head * tokens / gpu.head / 1e12,
        "norms, copies": _moved(shape, choice, tokens) / gpu.bandwidth_tb / 1e12,
        "optimizer": _optimizer(shape, choice, machine),
    }
    if shape.linear:
        compute["DeltaNet"] = _delta(shape, choice, tokens)
    busy = sum(compute.values())
    waits = {
        "all-to-all": traffic.all_to_all.seconds,
        "ring": max(traffic.ring.seconds - attention, 0.0) + _last_hop(shape, choice, traffic),
        "ZeRO": max(traffic.zero.seconds - busy, 0.0) + _parameters_from_host(shape, choice, machine),
        "host copies": _host_copies(shape, choice, tokens, busy),
    }
    return Times(compute, waits)


def attention_seconds(shape: Shape, choice: Choice, machine: Machine, pairs: Pairs) -> float:
    """Of all attention layers, the kernels alone."""
    forward, backward = (speed * 1e12 for speed in machine.gpu.attention_speed(shape.head_size))
    degrees, groups, seconds = choice.degrees, choice.head_chunks, 0.0
    for window, of_ring in pairs.items():
        flops = 4.0 * of_ring / degrees.ulysses * shape.query_width
        steps = (degrees.ring if window is None else min(degrees.ring, 2)) * groups
        beside = STEP_S * steps if degrees.ring > 1 else 0.0
        layer = [max(kernel + beside, LAUNCH_S * steps) for kernel in (flops / forward, 2.5 * flops / backward)]
        seconds += ((2 if choice.checkpointing else 1) * layer[0] + layer[1]) * shape.windows.count(window)
    return seconds


def busiest(shape: Shape, degrees: Topology, documents: Sequence[int]) -> Pairs:
    """By window, pairs of a query and a key of the busiest ring rank, under the layout that "auto" takes.

    Args:
        documents: cu_seqlens of the row.
    """
    found = {}
    for window in set(shape.windows):
        if len(documents) == 2 or degrees.ring == 1:
            found[window] = balance.Pairs(documents, (window,)).of_chunks(documents[-1], 1)[0] / degrees.ring
        else:
            found[window] = float(max(balance.assign(documents, degrees.ring, degrees.ulysses, (window,)).work))
    return found


def _moved(shape: Shape, choice: Choice, tokens: int) -> float:
    layer = LAYER_BYTES * (1.0 if choice.checkpointing else 0.75) * (NORM_TILES if choice.tiled_mlp else 1.0)
    exchange = EXCHANGE_BYTES if choice.degrees.ulysses > 1 else 0.0
    return tokens * shape.layers * shape.hidden * (layer + exchange)


def _optimizer(shape: Shape, choice: Choice, machine: Machine) -> float:
    mine = shape.parameters / (choice.degrees.world if choice.stage else 1)
    if not choice.offload_optimizer:
        return OPTIMIZER_BYTES * mine / machine.gpu.bandwidth_tb / 1e12
    of_host = 28.0 * mine * machine.per_host  # what Adam reads and writes
    return of_host / machines.HOST_ADAM + 4.0 * mine / machines.HOST_GB_PER_S / 1e9


def _delta(shape: Shape, choice: Choice, tokens: int) -> float:
    forward, backward = DELTA_S
    work = sum(layer.value_heads * layer.value_size / 128 for layer in shape.linear) * tokens
    return work * (forward * (2 if choice.checkpointing else 1) + backward)


def _last_hop(shape: Shape, choice: Choice, traffic: Traffic) -> float:
    """The gradients' way home, behind which there is nothing left to compute: one hop of a layer."""
    ring = choice.degrees.ring
    if ring == 1:
        return 0.0
    weight = 2.0 / ((3 if choice.checkpointing else 2) * (ring - 1) + 2.0 * ring)
    return traffic.ring.seconds * weight


def _parameters_from_host(shape: Shape, choice: Choice, machine: Machine) -> float:
    if not choice.offload_parameters:
        return 0.0
    return 3.0 * 2.0 * shape.parameters / choice.degrees.world / machines.HOST_GB_PER_S / 1e9


def _host_copies(shape: Shape, choice: Choice, tokens: int, busy: float) -> float:
    if not choice.activation_offload:
        return 0.0
    one_way = 2.0 * tokens * shape.hidden * shape.layers / machines.HOST_GB_PER_S / 1e9
    return max(one_way - busy / 4, 0.0) + max(one_way - busy * 3 / 4, 0.0)


def boundaries(lengths: Sequence[int]) -> tuple[int, ...]:
    """cu_seqlens of documents."""
    return (0, *accumulate(lengths))

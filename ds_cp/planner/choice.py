"""What can be chosen, and which choices are legal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ds_cp import config, layout, topology
from ds_cp.planner.machine import Machine
from ds_cp.planner.shape import Shape
from ds_cp.topology import Topology


@dataclass(frozen=True)
class Choice:
    """One way to train."""

    degrees: Topology
    stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    checkpointing: bool = True
    activation_offload: bool = False
    tiled_mlp: bool = False
    tiled_loss: bool = True
    """`loss_chunk` auto; else whole logits."""
    head_chunks: int = 1
    linear: str = "heads"

    @property
    def savings(self) -> int:
        """How many things it does for memory alone."""
        return sum(
            (self.offload_optimizer, self.offload_parameters, self.checkpointing, self.activation_offload, self.tiled_mlp)
        ) + (self.head_chunks > 1)


def degrees(shape: Shape, machine: Machine, tokens: int, illegal: Counter[str]) -> Iterator[tuple[Topology, str]]:
    """Legal (ulysses, ring, data) with the mode of DeltaNet layers; counts the others by reason in `illegal`."""
    for size in config.divisors(machine.gpus):
        for ulysses in config.divisors(size):
            found = Topology(ulysses=ulysses, ring=size // ulysses, data=machine.gpus // size)
            reason, linear = _reason(shape, found, tokens)
            if reason is None:
                yield found, linear
            else:
                illegal[reason] += 1


def _reason(shape: Shape, degrees: Topology, tokens: int) -> tuple[str | None, str]:
    for query, kv in shape.heads:
        reason = topology.heads_illegal(degrees.ulysses, query, kv)
        if reason is not None:
            return f"ulysses {degrees.ulysses}: {reason}", ""
    if tokens < layout.pad_multiple("auto", degrees.ring, degrees.ulysses):
        return f"size {degrees.size}: more pieces than the row has tokens", ""
    if not shape.linear or degrees.size == 1:
        return None, "heads"
    try:
        return None, topology.resolve_linear("auto", degrees, shape.linear_heads)
    except ValueError:
        return f"size {degrees.size} with ulysses {degrees.ulysses}: the Gated DeltaNet layers' heads cannot be shared so", ""


def variants(shape: Shape, degrees: Topology, linear: str) -> Iterator[Choice]:
    """Everything else that can be chosen for these degrees; what saves memory at a price comes after what does not."""
    plain = Choice(degrees, 0, linear=linear, tiled_loss=degrees.size > 1)
    for states in _states(plain):
        yield from _activations(states, shape)


def _states(plain: Choice) -> Iterator[Choice]:
    for stage in (0, 1, 2, 3):
        yield replace(plain, stage=stage)
        if stage:
            yield replace(plain, stage=stage, offload_optimizer=True)
    yield replace(plain, stage=3, offload_optimizer=True, offload_parameters=True)


def _activations(plain: Choice, shape: Shape) -> Iterator[Choice]:
    sharded = plain.degrees.size > 1  # with size 1 the block is off
    tiled = (False, True) if sharded and shape.tiled_mlp_refused is None else (False,)
    chunks = _head_chunks(plain, shape) if sharded else [1]
    for checkpointing, offload in ((False, False), (True, False), (True, True)):
        if offload and not sharded:
            continue
        for tiled_mlp in tiled:
            for groups in chunks:
                yield replace(
                    plain, checkpointing=checkpointing, activation_offload=offload, tiled_mlp=tiled_mlp, head_chunks=groups
                )
    if sharded:
        yield replace(plain, checkpointing=True, tiled_loss=False)


def _head_chunks(plain: Choice, shape: Shape) -> list[int]:
    """1 and the most, where there is an all-to-all."""
    passing = plain.linear == "state" and plain.degrees.ring > 1 and bool(shape.linear)
    most = topology.resolve_head_chunks("auto", plain.degrees, list(shape.heads), passing, least_memory=True)
    return sorted({1, most})

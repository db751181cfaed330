"""Bytes of one rank, by part: what lies there between steps, what a step keeps for backward, and its worst moment.

Moments, each with what lives then (elements of a token in 2 bytes each, of one layer; D hidden, Q query heads, K keys and values,
F inner width of the MLP):

    loss       the last norm's 4D, whole logits at 12 bytes an entry; or in tiles: the head's gradient in fp32, two tiles, D
    mlp        norms 8D, q, k, v, out before and after the all-to-all, 3F kept and 3F of gradients, the gradient of the output D
    DeltaNet   the same of such a layer, by what one was seen to hold
    attention  the first norm's 4D, q, k, v, out, their gradients, the kernel's fp32 sums; a ring's blocks and sums in flight
    optimizer  temporaries of AdamW over at most DeepSpeed's sub_group_size parameters

    norm       x in fp32 (2D), normalised (D), output (D); in tiles its input and output alone

What HF's layers and DeepSpeed 0.19.8 keep was read from their code; docs/planner.md compares the sum with measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_cp import topology
from ds_cp.planner.choice import Choice
from ds_cp.planner.machine import GIB
from ds_cp.planner.shape import Shape

CUBLAS = 64 * 2**20
TILE_BYTES = 256 * 2**20
OFFLOADED_ON_DEVICE = 2
DQ_WAITING = 4
"""Of a ring's steps, before they are summed, by kernels that do not sum themselves (`ds_cp.kernels.sums`)."""
DELTA_WIDTHS = 37.0
"""What such a layer holds in backward over the value heads' width in bf16: fitted to the peak of a Qwen3.5 on two H200s, 65,536
tokens each, of whose first step autotuning is a part. fla's kernels alone were seen to hold 16.2 (one rank of 8)."""


@dataclass(frozen=True)
class Settings:
    """DeepSpeed's, by default those that it has by default; bytes a parameter that the optimizer's step takes beside its state."""

    bucket: float = 5e8
    live: float = 1e9
    sub_group: float = 1e9
    optimizer_bytes: float = 8.0
    unsharded_bytes: float = 8.0
    """Of those, without gradients, at ZeRO 0, where it sees the model's own parameters (assumed)."""
    tile_bytes: float = TILE_BYTES
    """Of a tile of logits, and how large a shard's must be to be tiled."""
    tile_copies: float = 2.0
    fixed: float = CUBLAS
    ring_kept: bool = False
    """Of checkpointed layers: keys and values of the other ring ranks wait for backward, instead of two buffers by turns."""


DEFAULT = Settings()


@dataclass(frozen=True)
class Memory:
    """Bytes. `moments` are what a step holds beside the state and what it keeps, when it holds most."""

    state: dict[str, float]
    gradients: float
    """Of backward: what ZeRO 0 to 2 do not hold between steps."""
    kept: float
    moments: dict[str, float]
    host: float

    @property
    def moment(self) -> str:
        return max(self.moments, key=self.at.__getitem__)

    @property
    def at(self) -> dict[str, float]:
        """The total at each moment."""
        return {name: sum(self._parts(name).values()) for name in self.moments}

    @property
    def peak(self) -> float:
        return max(self.at.values())

    @property
    def parts(self) -> dict[str, float]:
        """They add up to the peak."""
        return self._parts(self.moment)

    def _parts(self, moment: str) -> dict[str, float]:
        """Of the gradients none is there before backward begins; in the optimizer's step they are among its temporaries."""
        parts = dict(self.state)
        parts["gradients"] += 0.0 if moment in ("loss", "optimizer") else self.gradients
        parts["kept for backward"] = 0.0 if moment == "optimizer" else self.kept
        return {**parts, f"at work ({moment})": self.moments[moment]}


def of(shape: Shape, choice: Choice, tokens: int, settings: Settings = DEFAULT) -> Memory:
    """Of one rank with so many tokens (of one micro-batch)."""
    state, gradients, host = _state(shape, choice, settings)
    kept = 2.0 * tokens * _kept(shape, choice)
    if choice.activation_offload:
        host += 2.0 * tokens * shape.hidden * (shape.layers + 1)
    gathered = min(shape.parameters, settings.live + shape.layer) * 2.0 if choice.stage == 3 else 0.0
    moments = {
        "loss": gathered + _loss(shape, choice, tokens, settings),
        "mlp": gathered + _mlp(shape, choice, tokens),
        "attention": gathered + 2.0 * tokens * _attention(shape, choice, settings.ring_kept),
        "optimizer": _optimizer(shape, choice, settings),
    }
    if shape.linear:
        moments["DeltaNet"] = gathered + 2.0 * tokens * _delta(shape, choice)
    return Memory(state, gradients, kept, moments, host)


def _state(shape: Shape, choice: Choice, settings: Settings) -> tuple[dict[str, float], float, float]:
    """(on the GPU by part between steps, gradients that backward adds, on the host)."""
    count, host = shape.parameters, 0.0
    mine = count / choice.degrees.world
    parameters = 2.0 * (mine if choice.stage == 3 else count)
    optimizer = 12.0 * (mine if choice.stage >= 1 else count)
    between = 2.0 * mine if choice.stage == 3 else 0.0
    passing = {0: 2.0 * count, 1: 2.0 * count, 2: 2.0 * mine, 3: 0.0}[choice.stage]
    if choice.offload_optimizer:
        host += optimizer + between + 4.0 * mine  # the gradients in fp32 as well
        optimizer = between = 0.0
        passing = passing if choice.stage == 1 else 0.0
    if choice.offload_parameters:
        host += parameters
        parameters = 0.0
    buckets = (2.0 * settings.bucket if choice.stage else 0.0) + settings.fixed
    return {"parameters": parameters, "gradients": between, "optimizer": optimizer, "buckets": buckets}, passing, host


def _optimizer(shape: Shape, choice: Choice, settings: Settings) -> float:
    """Temporaries of its step, gradients among them; at stage 0 those of the whole model, in bf16 and fp32."""
    if choice.offload_optimizer:
        return 0.0
    if choice.stage == 0:
        return (6.0 + settings.unsharded_bytes) * shape.parameters
    mine = shape.parameters / choice.degrees.world
    return settings.optimizer_bytes * (min(mine, settings.sub_group) if choice.stage == 3 else mine)


def _norm(shape: Shape, choice: Choice) -> float:
    """Elements of 2 bytes that a norm keeps beside its input, output included."""
    return shape.hidden * (1.0 if choice.tiled_mlp else shape.norm_kept)


def _widths(shape: Shape, choice: Choice) -> tuple[float, float]:
    """(query heads, key and value heads) of a rank's tokens after the all-to-all, elements a token."""
    split = topology.split_heads(choice.degrees.ulysses, *shape.heads[0])
    return shape.query_width, 2.0 * split.kv * choice.degrees.ulysses * shape.head_size


def _small(shape: Shape) -> float:
    """Positions' cos and sin, lse (fp32), norms of queries and keys."""
    norms = 3.0 * (shape.query_width + shape.kv_heads * shape.head_size) if shape.query_key_norms else 0.0
    return 2.0 * shape.head_size + 2.0 * shape.heads[0][0] + norms


def _layer(shape: Shape, choice: Choice) -> float:
    """What a layer keeps beside its input when it is not checkpointed, or recomputed. Its MLP's output is not kept."""
    query, kv = _widths(shape, choice)
    twice = choice.degrees.ulysses > 1 and choice.head_chunks == 1  # the output before and after the all-to-all
    attention = query + kv + query * (2.0 if twice else 1.0)
    inner = 0.0 if choice.tiled_mlp else 4.0 * shape.inner
    copies = 2.0 * shape.routed * shape.hidden  # of a token for each of its experts, and what they give
    inputs = shape.hidden * (shape.norms - 1) if choice.tiled_mlp else 0.0  # of norms; the first one's is the layer's
    return _norm(shape, choice) * shape.norms + attention + inner + copies + inputs + _small(shape)


def _kept(shape: Shape, choice: Choice) -> float:
    """Elements a token that are kept until the layers' backward begins."""
    if not choice.checkpointing:
        return shape.layers * (shape.hidden + _layer(shape, choice))
    return shape.hidden * (min(OFFLOADED_ON_DEVICE, shape.layers) if choice.activation_offload else shape.layers)


def _recomputed(shape: Shape, choice: Choice, parts: float) -> float:
    """Without checkpointing what a layer keeps is counted with all layers'."""
    return parts if choice.checkpointing else parts - _layer(shape, choice)


def _loss(shape: Shape, choice: Choice, tokens: int, settings: Settings) -> float:
    norm = _norm(shape, choice) + (0.0 if choice.activation_offload or not choice.tiled_mlp else shape.hidden)
    kept, logits = 2.0 * tokens * norm, 2.0 * tokens * shape.vocabulary
    if not choice.tiled_loss or logits <= settings.tile_bytes:
        return kept + 6.0 * logits
    return kept + 4.0 * shape.vocabulary * shape.hidden + settings.tile_copies * settings.tile_bytes + 2.0 * tokens * shape.hidden


def _mlp(shape: Shape, choice: Choice, tokens: int) -> float:
    """In backward: what the layer keeps, three gradients as wide as the MLP in place of its product, that of the output."""
    d, inner = shape.hidden, shape.inner
    if not choice.tiled_mlp:
        working = _layer(shape, choice) - inner + 3.0 * inner + d + shape.routed * d
        return 2.0 * tokens * _recomputed(shape, choice, working) + 2.0 * shape.matrix
    tile = min(tokens, d)
    sums, of_tile = 4.0 * 3.0 * d * inner, 2.0 * tile * 7.0 * inner
    return 2.0 * tokens * _recomputed(shape, choice, _layer(shape, choice) + 2.0 * d) + sums + of_tile


def _attention(shape: Shape, choice: Choice, ring_kept: bool) -> float:
    """In backward, elements a token; the layer's MLP is done, the gradient of its residual waits."""
    query, kv = _widths(shape, choice)
    norm, ring = _norm(shape, choice), choice.degrees.ring
    groups = choice.head_chunks
    if groups > 1:
        shared = groups > choice_kv(shape, choice)
        messages = (6.0 * query + query + 2.0 * query) / groups
        working = norm + shape.hidden + 4.0 * query + kv + (2.0 if shared else 1.0) * kv + messages + 2.0 * kv
    else:
        fp32 = 2.0 * query + 2.0 * kv
        working = norm + shape.hidden + (query + kv) + query + query + (query + kv) + fp32
    if ring > 1:
        working += 6.0 * kv + (max(ring - 1, 2) if ring_kept else 2.0) * kv + min(DQ_WAITING, ring - 1) * query / groups
    working += _small(shape)
    if choice.checkpointing:
        return working
    own = _layer(shape, choice) - (0.0 if choice.tiled_mlp else 4.0 * shape.inner)
    return max(working - own, 0.0)


def _delta(shape: Shape, choice: Choice) -> float:
    """Of a Gated DeltaNet layer's backward, its projections included."""
    layer = shape.linear[0]
    values, keys = layer.value_heads * layer.value_size, layer.key_heads * layer.key_size
    return _norm(shape, choice) + shape.hidden + 2.0 * (values + keys) + DELTA_WIDTHS * values


def choice_kv(shape: Shape, choice: Choice) -> int:
    """Key/value heads of a rank."""
    return topology.split_heads(choice.degrees.ulysses, *shape.heads[0]).kv


def gib(size: float) -> float:
    return size / GIB

"""What the planner knows of a model: counts of parameters, heads and widths."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """A Gated DeltaNet layer."""

    value_heads: int
    key_heads: int
    value_size: int
    key_size: int


@dataclass(frozen=True)
class Shape:
    """A causal language model. Widths are elements of a token."""

    name: str
    hidden: int
    layers: int
    vocabulary: int
    heads: tuple[tuple[int, int], ...]
    """(query heads, key/value heads) of its attention layers, each pair once, the costliest first."""
    head_size: int
    windows: tuple[int | None, ...]
    """Of each attention layer the keys that a query attends; None: all before it."""
    parameters: int
    embedding: int
    """Parameters of the input embedding."""
    head: int
    """Parameters of the output head that are its own: 0 where it is tied to the embedding."""
    mlp: int
    """Parameters of the MLPs of all layers that a token meets: with experts, of its experts."""
    mixers: int
    """Parameters of the matrices of all layers outside MLPs."""
    linear: tuple[Linear, ...] = ()
    query_key_norms: bool = False
    matrix: int = 0
    """The largest parameter of a layer: experts of a layer are one."""
    norms: int = 2
    """Of a layer, over the hidden size."""
    norm_kept: float = 4.0
    """What one keeps beside its input, output included, in elements of 2 bytes for each of the hidden size."""
    routed: int = 0
    """Experts that a token meets."""
    tiled_mlp_refused: str | None = None
    """Why `tiled_mlp` is not possible."""

    @property
    def inner(self) -> float:
        """Width of a layer's MLP, of two matrices up and one down."""
        return self.mlp / self.layers / 3 / self.hidden

    @property
    def layer(self) -> float:
        """Parameters of a layer."""
        return (self.parameters - self.embedding - self.head) / self.layers

    @property
    def query_width(self) -> int:
        return self.heads[0][0] * self.head_size

    @property
    def kv_heads(self) -> int:
        return self.heads[0][1]

    @property
    def linear_heads(self) -> list[tuple[int, int]]:
        return [(layer.value_heads, layer.key_heads) for layer in self.linear]

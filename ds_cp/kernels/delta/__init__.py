"""Gated DeltaNet kernels: one module each, with the three functions of `Kernel`; the config value is the module's name.

Shapes: S tokens given, C channels of the convolution, W its width, K key heads, V value heads (K divides V; value head i reads key
head i * K // V), H key head size, G value head size.

    span = Span(documents)                                        # whole documents, e.g. the whole row with some of the heads
    span = piece(documents, rank, size, gather)                   # rank's contiguous piece of the row: state is passed
    qkv_SC = kernel.convolve(qkv_SC, weight_CW, bias_C, "silu", span)
    out_SVG = kernel.delta_rule(q_SKH, k_SKH, v_SVG, g_SV, beta_SV, span)

All of it is differentiable. With state passing every rank of the ring must make the same calls in the same order, forward and
backward; a rank that needs nothing from the others takes part all the same, and its backward does too.
"""

from __future__ import annotations

import importlib
import pkgutil
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, cast

from torch import Tensor


@dataclass(frozen=True)
class Passing:
    """How a piece of the row meets the pieces of the other ring ranks. Pieces are equal and in rank order."""

    rank: int
    size: int
    gather: Callable[[Tensor], Tensor]
    """Everybody's tensor on a new dim 0, [size, ...]; its backward gives each rank the sum of all gradients of its tensor."""
    before: int
    """Tokens that the piece's first document has on earlier ranks; 0 where it begins here."""
    after: int
    """Tokens that its last document has on later ranks."""


@dataclass(frozen=True, eq=False)
class Span:
    """The tokens that a kernel is given: whole documents, or one rank's contiguous piece of the row."""

    documents: tuple[int, ...]
    """cu_seqlens of the tokens given: 0, ..., S, ascending. The first and last may be parts of documents, see `passing`."""
    cu_seqlens: Tensor | None = None
    """The same as int64 on the device, put there once a batch; None: a kernel that needs it makes its own."""
    passing: Passing | None = None
    """None: every document begins and ends here."""
    plans: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What a kernel works out from the documents, once a batch."""

    def __post_init__(self) -> None:
        assert self.documents[0] == 0, self.documents
        assert all(a < b for a, b in pairwise(self.documents)), self.documents
        assert self.cu_seqlens is None or len(self.cu_seqlens) == len(self.documents)

    @property
    def tokens(self) -> int:
        return self.documents[-1]


def piece(
    documents: tuple[int, ...], rank: int, size: int, gather: Callable[[Tensor], Tensor], cu_seqlens: Tensor | None = None
) -> Span:
    """The span of ring rank `rank`: the rank-th of `size` equal parts of the row with cu_seqlens `documents`.

    `cu_seqlens`, if given, is that of the piece: `piece(...).documents`.
    """
    assert documents[-1] % size == 0, "the row is padded so that the pieces are equal"
    tokens = documents[-1] // size
    start, end = rank * tokens, (rank + 1) * tokens
    first = documents[bisect_right(documents, start) - 1]
    last = documents[bisect_right(documents, end - 1)]
    inside = tuple(bound - start for bound in documents if start < bound < end)
    passing = Passing(rank=rank, size=size, gather=gather, before=start - first, after=last - end)
    return Span((0, *inside, tokens), cu_seqlens, passing)


@dataclass(frozen=True)
class Shapes:
    """Integers of one DeltaNet layer, as a rank computes it."""

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    conv_width: int
    activation: str | None


class Kernel(Protocol):
    """What a kernel module offers."""

    __name__: str

    def unsupported(self, shapes: Shapes, device: str, dtype: Any, passing: bool) -> str | None:
        """Why this kernel cannot compute such a layer here and what to change, or None. Launches nothing; for start-up.

        Args:
            device: "cuda" or "cpu". dtype: of the activations. passing: whether state will be passed between ranks.
        """

    def convolve(self, x_SC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, activation: str | None, span: Span) -> Tensor:
        """Causal depthwise convolution [S, C], in x's dtype; what is before a document's first token is 0."""

    def delta_rule(self, q_SKH: Tensor, k_SKH: Tensor, v_SVG: Tensor, g_SV: Tensor, beta_SV: Tensor, span: Span) -> Tensor:
        """Gated delta rule [S, V, G] in v's dtype, the state 0 where a document begins.

        q and k are divided by their norms (the root of the sum of squares + 1e-6) and q by the root of H; g is the log of the
        decay, <= 0, in fp32 (or fp64); beta is the writing strength.
        """


ACTIVATIONS = (None, "silu", "swish")
"""Of the convolution; the last two are one."""


def shapes_reason(shapes: Shapes) -> str | None:
    """What every kernel refuses."""
    if shapes.value_heads % shapes.key_heads:
        return f"{shapes.key_heads} key heads do not divide {shapes.value_heads} value heads"
    if shapes.activation not in ACTIVATIONS:
        return f"the convolution's activation is {shapes.activation!r}; it can be one of {list(ACTIVATIONS)}"
    return None


def hopper_reason(capability: int, triton: str, tilelang: bool) -> str | None:
    """Why fla would refuse the backward on a GPU of this major compute capability, in the middle of training, or None.

    Args:
        triton: its version. tilelang: whether fla can use it: installed, with an nvcc to compile, and not switched off.
    """
    release = tuple(int(part) for part in triton.split("+")[0].split(".")[:3])
    if capability != 9 or tilelang or not (3, 4) <= release < (3, 7, 1):
        return None
    return (
        f"on Hopper under Triton {triton} fla's backward needs tilelang (Triton 3.4 to 3.7.0 compute it wrong): "
        'pip install "tilelang>=0.1.9" beside a CUDA toolkit with nvcc, or a PyTorch whose Triton is 3.7.1 or newer'
    )


def names() -> list[str]:
    """All kernels in the folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> Kernel:
    """The kernel module `name`.

    Raises:
        ValueError: there is no such module, or what it needs is not installed.
    """
    if name not in names():
        raise ValueError(f"sequence_parallel.delta_kernel: {name!r} is not in this version; available: {names()}")
    try:
        return cast(Kernel, importlib.import_module(f"{__name__}.{name}"))
    except ImportError as error:
        raise ValueError(f"sequence_parallel.delta_kernel: {name!r} cannot be loaded here: {error}") from error


def resolve(name: str, device: str) -> Kernel:
    """The kernel of the config's `delta_kernel`; "auto" is fla on CUDA and the reference on CPU. Ask its `unsupported` next.

    Raises:
        ValueError: there is no such kernel, or what it needs is not installed.
    """
    return load(("fla" if device == "cuda" else "reference") if name == "auto" else name)

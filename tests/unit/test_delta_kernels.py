"""The delta rule and its convolution against the recurrence written token by token, and against HF's; documents; pieces of the row.

Shapes: S tokens, C channels, W width, K key heads, V value heads, H key head size, G value head size.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

from ds_cp.kernels import affine, delta
from ds_cp.kernels.delta import Shapes, Span, reference

SHAPES = Shapes(key_heads=2, value_heads=4, key_size=8, value_size=6, conv_width=4, activation="silu")
LENGTHS = (1, 2, 3, 5, 31, 63, 64, 65, 127, 128, 129)


def inputs(tokens: int, shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v, g, beta as a Qwen3.5 layer would make them, gates strong and weak."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(tokens, *shape, generator=generator, dtype=torch.float64)

    qk = [normal(shapes.key_heads, shapes.key_size) for _ in range(2)]
    v = normal(shapes.value_heads, shapes.value_size)
    g = -torch.rand(shapes.value_heads, generator=generator, dtype=torch.float64) * functional.softplus(normal(shapes.value_heads))
    tensors = [*qk, v, g, normal(shapes.value_heads).sigmoid()]
    return [x.to(dtype).requires_grad_() for x in tensors]


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, documents: tuple[int, ...]) -> Tensor:
    """Token by token, each document from a state of zeros."""
    sharing = v.shape[1] // q.shape[1]
    q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(sharing, 1) for x in (q * q.shape[-1] ** -0.5, k))
    out = []
    for start, end in pairwise(documents):
        state = v.new_zeros(v.shape[1], q.shape[-1], v.shape[-1])
        for t in range(start, end):
            state = state * g[t].exp()[:, None, None]
            change = (v[t] - torch.einsum("vhg,vh->vg", state, k[t])) * beta[t][:, None]
            state = state + torch.einsum("vh,vg->vhg", k[t], change)
            out.append(torch.einsum("vhg,vh->vg", state, q[t]))
    return torch.stack(out)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, documents: tuple[int, ...]) -> Tensor:
    """Each document through PyTorch's convolution."""
    parts = []
    for start, end in pairwise(documents):
        padded = functional.pad(x[start:end].T, (weight.shape[1] - 1, 0))
        parts.append(functional.conv1d(padded[None], weight[:, None], bias, groups=x.shape[1])[0].T)
    out = torch.cat(parts)
    return functional.silu(out) if activation else out


def results(function, tensors: list[Tensor], *rest: object) -> list[Tensor]:
    """out and the gradient of every tensor under a random dout."""
    out = function(*tensors, *rest)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, dout)]


def worst(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference relative to the largest entry, over all tensors."""
    pairs = list(zip(found, wanted, strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)) for a, b in pairs)


def bounds(lengths: list[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


# The reference


@given(
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=6),
    key_heads=st.sampled_from([1, 2, 3]),
    sharing=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40)
def test_the_reference_is_the_recurrence_in_every_document(lengths: list[int], key_heads: int, sharing: int, seed: int) -> None:
    shapes = dataclasses.replace(SHAPES, key_heads=key_heads, value_heads=key_heads * sharing)
    documents, tensors = bounds(lengths), inputs(sum(lengths), shapes, seed)
    found = results(reference.delta_rule, tensors, Span(documents))
    wanted = results(recurrence, tensors, documents)
    if max(lengths) == 1:  # nothing is read from what a decay was applied to
        assert not found[4].any()
        found[4], wanted[4] = found[4] + 1, wanted[4] + 1
    assert worst(found, wanted) <= 1e-10


def test_many_one_token_documents_and_strong_gates() -> None:
    lengths = [1] * 150 + [70] + [1] * 64
    tensors = inputs(sum(lengths), SHAPES)
    with torch.no_grad():
        tensors[3].mul_(20)
    documents = bounds(lengths)
    found = results(reference.delta_rule, tensors, Span(documents))
    assert worst(found, results(recurrence, tensors, documents)) <= 1e-10


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_the_reference_is_hfs_for_one_document(tokens: int) -> None:
    tensors = inputs(tokens, SHAPES, dtype=torch.float32)

    def theirs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        q, k, v, g, beta = (x.unsqueeze(0) for x in (q, k, v, g, beta))
        return torch_chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0][0]

    found, wanted = results(reference.delta_rule, tensors, Span((0, tokens))), results(theirs, tensors)
    assert worst(found[:4] + found[5:], wanted[:4] + wanted[5:]) <= 1e-5
    if tokens > 1:
        assert worst(found[4:5], wanted[4:5]) <= 1e-5


def test_lower_precision_is_computed_in_fp32() -> None:
    low = inputs(100, SHAPES, dtype=torch.bfloat16)
    same = [x.detach().float() for x in low]
    found = reference.delta_rule(*low[:3], same[3], low[4], Span((0, 40, 100)))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, reference.delta_rule(*same, Span((0, 40, 100))).bfloat16())


def test_autocast_does_not_lower_the_precision() -> None:
    tensors = inputs(100, SHAPES, dtype=torch.float32)
    plain = results(reference.delta_rule, tensors, Span((0, 40, 100)))

    def under(*args: object) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return reference.delta_rule(*args)

    assert all(torch.equal(a, b) for a, b in zip(plain, results(under, tensors, Span((0, 40, 100))), strict=True))


def test_what_the_decay_gets_is_exact_to_rounding() -> None:
    """Its gradient over a row, which A_log and dt_bias get, is a difference of large sums: off by 1e-6 and more in fp32 sums."""
    for seed in range(6):
        tensors = inputs(256, SHAPES, seed)
        dout = torch.randn(256, SHAPES.value_heads, SHAPES.value_size, generator=torch.Generator().manual_seed(seed))
        low = [x.detach().float().requires_grad_() for x in tensors]
        high = [x.detach().double().requires_grad_() for x in low]
        totals = []
        for each in (low, high):
            out = reference.delta_rule(*each, Span((0, 256)))
            totals.append(torch.autograd.grad(out, each[3], dout.to(out.dtype))[0].double().sum(0))
        assert float((totals[0] - totals[1]).abs().max() / totals[1].abs().max()) <= 6e-7


def test_a_document_is_the_same_to_rounding_wherever_it_stands() -> None:
    alone = inputs(70, SHAPES)
    packed = [torch.cat([x * 3, x, x]) for x in alone]
    with torch.no_grad():
        whole = reference.delta_rule(*packed, Span((0, 70, 140, 210)))
        single = reference.delta_rule(*alone, Span((0, 70)))
    assert worst([whole[70:140], whole[140:]], [single, single]) <= 1e-12


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    width=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    activation=st.sampled_from(delta.ACTIVATIONS),
)
@settings(max_examples=40)
def test_the_convolution_is_pytorchs_in_every_document(lengths: list[int], width: int, bias: bool, activation: str | None) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [(sum(lengths), 5), (5, width), *([(5,)] if bias else [])]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]

    def call(function, last: object) -> list[Tensor]:
        return results(lambda x, weight, bias=None: function(x, weight, bias, activation, last), tensors)

    documents = bounds(lengths)
    assert worst(call(reference.convolve, Span(documents)), call(convolution, documents)) <= 1e-12


# Pieces of the row


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.sampled_from([1, 2, 4, 8]))
def test_pieces_are_the_row_and_meet_where_documents_cross(lengths: list[int], size: int) -> None:
    lengths[-1] += -sum(lengths) % size
    documents = bounds(lengths)
    pieces = [delta.piece(documents, rank, size, gather=lambda x: x) for rank in range(size)]
    tokens = documents[-1] // size
    assert all(span.tokens == tokens for span in pieces)
    starts = {rank * tokens + start for rank, span in enumerate(pieces) for start in span.documents[bool(span.passing.before) : -1]}
    assert starts == set(documents[:-1])
    for rank, span in enumerate(pieces):
        start = rank * tokens
        first = max(bound for bound in documents if bound <= start)
        last = min(bound for bound in documents if bound >= start + tokens)
        assert (span.passing.before, span.passing.after) == (start - first, last - start - tokens)
    assert [bool(span.passing.after) for span in pieces[:-1]] == [bool(span.passing.before) for span in pieces[1:]]
    assert not pieces[0].passing.before
    assert not pieces[-1].passing.after


# Choosing


def test_auto_is_the_reference_on_cpu() -> None:
    assert delta.resolve("auto", "cpu") is reference


def test_an_unknown_kernel_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"delta_kernel: 'fast' is not in this version; available: .*reference"):
        delta.resolve("fast", "cpu")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key_heads": 3}, "3 key heads do not divide 4 value heads"),
        ({"activation": "gelu"}, "'gelu'; it can be one of"),
        ({}, None),
    ],
)
def test_what_no_kernel_computes_is_refused(change: dict, words: str | None) -> None:
    reason = reference.unsupported(dataclasses.replace(SHAPES, **change), "cpu", torch.float32, passing=False)
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize(
    ("capability", "triton", "tilelang", "refused"),
    [
        (9, "3.3.1", False, False),
        (9, "3.4.0", False, True),
        (9, "3.6.0", False, True),
        (9, "3.7.0+git1234", False, True),
        (9, "3.7.1", False, False),
        (9, "3.10.0", False, False),
        (9, "3.6.0", True, False),
        (8, "3.6.0", False, False),
        (10, "3.6.0", False, False),
    ],
)
def test_where_fla_refuses_its_backward_is_known_before_training(
    capability: int, triton: str, tilelang: bool, refused: bool
) -> None:
    reason = delta.hopper_reason(capability, triton, tilelang)
    assert (reason is not None) == refused
    assert reason is None or 'pip install "tilelang' in reason


def test_without_fla_the_refusal_names_what_to_install() -> None:
    if importlib.util.find_spec("fla") is not None:
        assert delta.resolve("auto", "cuda").__name__.endswith("fla")
        return
    with pytest.raises(ValueError, match=r"delta_kernel: 'fla' cannot be loaded here: .*pip install \"flash-linear-attention"):
        delta.resolve("auto", "cuda")


# Composing maps of the state


@given(st.integers(1, 9), st.integers(0, 100))
def test_prefixes_are_the_maps_one_after_another(maps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = torch.randn(maps, 2, 3, 4, generator=generator, dtype=torch.float64)
    m = torch.randn(maps, 2, 3, 3, generator=generator, dtype=torch.float64) / 2
    m[seed % maps] = 0.0
    found_n, found_m = affine.prefixes(n, m)
    for index in range(maps):
        assert worst([found_n[index]], [affine.final(n[: index + 1], m[: index + 1])]) <= 1e-12
        product = torch.eye(3, dtype=torch.float64).expand(2, 3, 3)
        for step in m[: index + 1]:
            product = step @ product
        assert (found_m[index] - product).abs().max() <= 1e-12


@given(st.lists(st.integers(1, 300), min_size=1, max_size=8), st.sampled_from([64, 128, 192]))
def test_documents_are_cut_into_whole_chunks(lengths: list[int], tokens: int) -> None:
    documents = bounds(lengths)
    segments, continues = affine.cut(documents, tokens, multiple=64)
    assert len(continues) == len(segments) - 1
    starts = [start for start, goes_on in zip(segments, continues, strict=False) if not goes_on]
    assert starts == list(documents[:-1])
    for (start, end), goes_on in zip(pairwise(segments), (*continues[1:], False), strict=True):
        assert 0 < end - start <= tokens
        assert not goes_on or (end - start) % 64 == 0

"""Every attention kernel that runs on CPU against PyTorch's attention in fp64 with an explicit mask, and merging.

Shapes: T query tokens, S key tokens, N query heads, M key/value heads, H head size.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ds_cp.kernels import attention
from ds_cp.kernels.attention import Kernel, Score, reference, torch_cpu
from ds_cp.kernels.merge import merge_, total
from ds_cp.tiles import Tile

SCALE = 0.37
SCORE = Score(SCALE)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def loadable() -> dict[str, Kernel]:
    """Kernels whose packages are installed."""
    found = {}
    for name in attention.names():
        try:
            importlib.import_module(f"{attention.__name__}.{name}")
        except ImportError:
            continue
        found[name] = attention.load(name)
    return found


def reason(kernel: Kernel) -> str | None:
    """Why a kernel does not run on this machine's CPU."""
    x = torch.ones(2, 1, 8)
    return kernel.unsupported(x, x, x, causal(2), SCORE)


def causal(*bounds: int) -> Tile:
    return Tile(0, bounds[-1], 0, bounds[-1], (0, *bounds))


def rectangle(queries: int, keys: int) -> Tile:
    return Tile(0, queries, 0, keys)


def band(queries: int, keys: int, window: int) -> Tile:
    """The queries that begin a run, against the keys before it."""
    return Tile(0, queries, 0, keys, window=window, ahead=keys)


KERNELS = {name: kernel for name, kernel in loadable().items() if reason(kernel) is None}
every_kernel = pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)

TILES = {
    "one document": causal(24),
    "documents": causal(9, 10, 11, 24),
    "one-token documents": causal(*range(1, 8)),
    "one token": causal(1),
    "wide rectangle": rectangle(5, 19),
    "high rectangle": rectangle(19, 5),
    "one query": rectangle(1, 13),
    "one key": rectangle(13, 1),
    "window 1": replace(causal(9, 10, 24), window=1),
    "window": replace(causal(9, 10, 24), window=5),
    "window wider than documents": replace(causal(9, 24), window=20),
    "band": band(4, 4, 5),
    "band of a document that begins": band(7, 3, 8),
    "band over several blocks": band(300, 300, 301),
}
HEADS = {"MHA": (4, 4), "GQA": (6, 2), "MQA": (4, 1)}


# The reference


def allowed(tile: Tile) -> Tensor:
    """[T, S], from the definition of a tile."""
    query, key = torch.arange(tile.q_end - tile.q_start)[:, None], torch.arange(tile.k_end - tile.k_start)[None, :]
    near = tile.ahead + query - key < (tile.window or 10**9)
    if tile.documents is None:
        return near
    same = torch.zeros(len(query), len(query), dtype=torch.bool)
    for start, end in pairwise(tile.documents):
        same[start:end, start:end] = True
    return same & (key <= query) & near


def dense(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask_TS: Tensor) -> dict[str, Tensor]:
    """out, lse, dq, dk, dv in fp64: PyTorch's unfused attention, its autograd, and the definition of lse."""
    leaves = [x.detach().double().clone().requires_grad_() for x in (q, k, v)]
    repeats = q.shape[1] // k.shape[1]
    heads = [leaves[0], *(x.repeat_interleave(repeats, dim=1) for x in leaves[1:])]
    q_NTH, k_NSH, v_NSH = (x.transpose(0, 1) for x in heads)
    with sdpa_kernel(SDPBackend.MATH):
        out = scaled_dot_product_attention(q_NTH, k_NSH, v_NSH, attn_mask=mask_TS, scale=SCALE).transpose(0, 1)
    grads = torch.autograd.grad(out, leaves, dout.double())
    scores = (q_NTH @ k_NSH.transpose(1, 2) * SCALE).masked_fill(~mask_TS, -math.inf)
    lse = scores.logsumexp(-1).transpose(0, 1)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def computed(kernel: Kernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, tile: Tile, score: Score = SCORE) -> dict[str, Tensor]:
    assert kernel.unsupported(q, k, v, tile, score) is None
    out, lse = kernel.forward(q, k, v, tile, score)
    grads = kernel.backward(dout, q, k, v, out, lse, tile, score)
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Errors relative to the largest entry, or to one where all are smaller."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        error = float((found[name].double() - value).abs().max() / value.abs().max().clamp(min=1))
        assert error <= tolerance, f"{name} is off by {error:.2e}"


# Inputs


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(
    tile: Tile, heads: tuple[int, int], size: int = 8, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dout, q, k, v; the scores spread over several units, so that a softmax is neither flat nor a step."""
    queries, keys = tile.q_end - tile.q_start, tile.k_end - tile.k_start
    (n, m), seed = heads, 10 * queries + keys
    shapes = ((queries, n), (queries, n), (keys, m), (keys, m))
    return tuple(random(*shape, size, dtype=dtype, seed=seed + i) for i, shape in enumerate(shapes))


def tokens_of_a_longer_row(x: Tensor) -> Tensor:
    longer = torch.full((x.shape[0] + 5, *x.shape[1:]), math.nan, dtype=x.dtype)
    longer[3:-2] = x
    return longer[3:-2]


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def heads_of_a_fused_projection(x: Tensor) -> Tensor:
    fused = torch.full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), math.nan, dtype=x.dtype)
    fused[:, 1:-2] = x
    return fused[:, 1:-2]


def every_other_token(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=0)[::2]


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    view.__name__: view for view in (tokens_of_a_longer_row, heads_first, heads_of_a_fused_projection, every_other_token)
}


# Which kernels


def test_the_reference_and_the_cpu_kernel_are_among_those_tested() -> None:
    assert {"reference", "torch_cpu"} <= KERNELS.keys()


def test_a_kernel_that_does_not_run_here_says_why() -> None:
    refusing = {name: reason(kernel) for name, kernel in loadable().items() if name not in KERNELS}
    assert "torch_flash" in refusing
    assert all(isinstance(why, str) and "cpu" in why for why in refusing.values()), refusing


def test_an_unknown_kernel_is_refused_with_the_names_of_the_folder() -> None:
    with pytest.raises(ValueError, match=r"attention_kernel: 'flash' is not in this version; available: \[.*'reference'"):
        attention.load("flash")


@every_kernel
def test_key_heads_of_another_size_are_refused(kernel: Kernel) -> None:
    q, k = torch.ones(2, 2, 8), torch.ones(2, 2, 16)
    assert kernel.unsupported(q, k, k, causal(2), SCORE) is not None


# Softcap


@pytest.mark.parametrize(
    "kernel", [k for n, k in KERNELS.items() if n != "reference"], ids=[n for n in KERNELS if n != "reference"]
)
def test_a_kernel_without_softcap_names_one_that_has_it(kernel: Kernel) -> None:
    x = torch.ones(2, 1, 8)
    assert kernel.unsupported(x, x, x, causal(2), Score(SCALE, 2.0)) == "it has no softcap; use reference"


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_the_reference_caps_scores_as_autograd_does(tile: Tile) -> None:
    """Against the written-out formula and its autograd."""
    dout, q, k, v = inputs(tile, (6, 2))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    k_SNH, v_SNH = (x.repeat_interleave(3, dim=1) for x in leaves[1:])
    scores = 2.0 * (torch.einsum("tnh,snh->nts", leaves[0], k_SNH) * SCALE / 2.0).tanh()
    scores = scores.masked_fill(~allowed(tile), -math.inf)
    out = torch.einsum("nts,snh->tnh", scores.softmax(-1), v_SNH)
    wanted = {"out": out.detach(), "lse": scores.logsumexp(-1).T.detach()}
    wanted |= dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True))
    assert_close(computed(reference, dout, q, k, v, tile, Score(SCALE, 2.0)), wanted, 1e-10)


# Conformance


@every_kernel
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_a_tile_equals_dense_attention(kernel: Kernel, tile: Tile, heads: tuple[int, int], dtype: torch.dtype) -> None:
    tensors = inputs(tile, heads, dtype=dtype)
    found = computed(kernel, *tensors, tile)
    assert_close(found, dense(*tensors, allowed(tile)), TOLERANCE[dtype])
    assert {name: x.dtype for name, x in found.items()} == dict.fromkeys(found, dtype)


@every_kernel
@pytest.mark.parametrize("size", [1, 3, 16, 64, 80, 256])
@pytest.mark.parametrize("tile", [causal(7, 20), rectangle(4, 9)], ids=["documents", "rectangle"])
def test_every_head_size_equals_dense_attention(kernel: Kernel, tile: Tile, size: int) -> None:
    tensors = inputs(tile, (4, 2), size=size)
    tensors = (tensors[0], tensors[1] * size**-0.25, tensors[2] * size**-0.25, tensors[3])
    assert_close(computed(kernel, *tensors, tile), dense(*tensors, allowed(tile)), 1e-10)


@every_kernel
@pytest.mark.parametrize(
    "tile",
    [causal(700), causal(300, 301, 700), causal(1700), rectangle(300, 700), replace(causal(1300, 1400), window=600)],
    ids=["one", "three", "longer", "rectangle", "window"],
)
def test_tiles_longer_than_a_kernels_blocks_equal_dense_attention(kernel: Kernel, tile: Tile) -> None:
    tensors = inputs(tile, (2, 1))
    assert_close(computed(kernel, *tensors, tile), dense(*tensors, allowed(tile)), 1e-10)


@pytest.mark.parametrize("keys", [4, 6])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "tile",
    [causal(4), causal(7), causal(24), causal(5, 6, 24), rectangle(2, 19), rectangle(19, 7)],
    ids=["one part", "two", "many", "documents", "wide", "high"],
)
def test_the_cpu_kernels_backward_over_parts_of_the_keys_equals_dense_attention(
    monkeypatch: pytest.MonkeyPatch, tile: Tile, dtype: torch.dtype, heads: tuple[int, int], keys: int
) -> None:
    monkeypatch.setattr(torch_cpu, "KEYS", keys)
    monkeypatch.setattr(torch_cpu, "LINE", 2)
    tensors = inputs(tile, heads, dtype=dtype)
    assert_close(computed(torch_cpu, *tensors, tile), dense(*tensors, allowed(tile)), TOLERANCE[dtype])


@given(length=st.integers(1, 100_000))
def test_the_cpu_kernels_parts_cover_the_keys_once_and_stay_below_its_own_block(length: int) -> None:
    parts = torch_cpu._parts(length)
    assert [start for start, _ in parts] == [0, *(end for _, end in parts[:-1])]
    assert parts[-1][1] == length
    assert all(0 < end - start <= torch_cpu.KEYS for start, end in parts)


@every_kernel
@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    kv=st.integers(1, 3),
    group=st.integers(1, 3),
)
def test_any_documents_and_heads_equal_dense_attention(kernel: Kernel, lengths: list[int], kv: int, group: int) -> None:
    tile = causal(*torch.tensor(lengths).cumsum(0).tolist())
    tensors = inputs(tile, (kv * group, kv))
    assert_close(computed(kernel, *tensors, tile), dense(*tensors, allowed(tile)), 1e-10)


@every_kernel
@settings(max_examples=50)
@given(queries=st.integers(1, 40), keys=st.integers(1, 40), kv=st.integers(1, 3), group=st.integers(1, 3))
def test_any_rectangle_equals_dense_attention(kernel: Kernel, queries: int, keys: int, kv: int, group: int) -> None:
    tile = rectangle(queries, keys)
    tensors = inputs(tile, (kv * group, kv))
    assert_close(computed(kernel, *tensors, tile), dense(*tensors, allowed(tile)), 1e-10)


@every_kernel
@pytest.mark.parametrize("view", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("tile", [causal(4, 5, 11), causal(11), rectangle(5, 9)], ids=["documents", "one", "rectangle"])
def test_strided_inputs_give_the_same_and_are_left_alone(kernel: Kernel, tile: Tile, view: Callable[[Tensor], Tensor]) -> None:
    tensors = inputs(tile, (6, 2))
    wanted = dense(*tensors, allowed(tile))
    dout, q, k, v = (view(x) for x in tensors)
    assert_close(computed(kernel, dout, q, k, v, tile), wanted, 1e-10)
    out, lse = view(wanted["out"]), view(wanted["lse"])
    grads = kernel.backward(dout, q, k, v, out, lse, tile, SCORE)
    assert_close(dict(zip(("dq", "dk", "dv"), grads, strict=True)), {name: wanted[name] for name in ("dq", "dk", "dv")}, 1e-10)
    for given_, before in zip((dout, q, k, v, out, lse), (*tensors, wanted["out"], wanted["lse"]), strict=True):
        assert torch.equal(given_, before)


@every_kernel
@pytest.mark.parametrize("tile", [causal(4, 5, 11), rectangle(5, 9)], ids=["documents", "rectangle"])
def test_an_expanded_dout_gives_the_gradient_of_the_sum(kernel: Kernel, tile: Tile) -> None:
    dout, q, k, v = inputs(tile, (6, 2))
    ones = torch.ones((), dtype=dout.dtype).expand_as(dout)  # what autograd hands over for out.sum()
    assert_close(computed(kernel, ones, q, k, v, tile), dense(ones, q, k, v, allowed(tile)), 1e-10)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tile", [causal(4, 5, 30), rectangle(5, 9)], ids=["documents", "rectangle"])
def test_low_precision_keeps_its_dtype_with_an_fp32_lse_and_twice_eagers_error(
    kernel: Kernel, tile: Tile, dtype: torch.dtype
) -> None:
    tensors = inputs(tile, (6, 2), dtype=dtype)
    found, wanted = computed(kernel, *tensors, tile), dense(*tensors, allowed(tile))
    assert {name: x.dtype for name, x in found.items()} == {**dict.fromkeys(found, dtype), "lse": torch.float32}
    # PyTorch's CPU kernel approximates exp here (6e-5); rounded to fp16, an lse of 4 would be off by 2e-3.
    assert float((found["lse"].double() - wanted["lse"]).abs().max()) <= 2e-4
    for name, value in eager(*tensors, allowed(tile)).items():
        ours, theirs = (float((x.double() - wanted[name]).abs().max()) for x in (found[name], value))
        assert ours <= 2 * theirs, (name, ours, theirs)


def eager(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, mask_TS: Tensor) -> dict[str, Tensor]:
    """out, dq, dk, dv as transformers' eager attention computes them in the inputs' own dtype: softmax alone in fp32."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    q_NTH, k_NSH, v_NSH = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).transpose(0, 1) for x in leaves)
    scores = (q_NTH @ k_NSH.transpose(1, 2) * SCALE).masked_fill(~mask_TS, -math.inf)
    out = (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v_NSH).transpose(0, 1)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True))}


@every_kernel
def test_large_scores_do_not_overflow(kernel: Kernel) -> None:
    tile = causal(3, 16)
    dout, q, k, v = inputs(tile, (2, 1), dtype=torch.float32)
    q = q * 300
    assert_close(computed(kernel, dout, q, k, v, tile), dense(dout, q, k, v, allowed(tile)), 1e-4)


def test_the_reference_gives_minus_infinity_and_zeros_for_a_query_without_keys() -> None:
    tile = rectangle(3, 0)
    dout, q, k, v = inputs(tile, (4, 2))
    found = computed(KERNELS["reference"], dout, q, k, v, tile)
    assert torch.equal(found.pop("lse"), torch.full((3, 4), -math.inf, dtype=torch.float64))
    for name, like in {"out": q, "dq": q, "dk": k, "dv": v}.items():
        assert torch.equal(found[name], torch.zeros_like(like)), name


# Merging


@st.composite
def blocks(draw: st.DrawFn) -> tuple[list[int], list[int], int, list[int]]:
    """Local documents, the lengths of earlier key blocks, how many local queries attend them, and the order of the blocks."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    earlier = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    return lengths, earlier, draw(st.integers(1, lengths[0])), draw(st.permutations(range(len(earlier))))


@every_kernel
@settings(max_examples=50)
@given(case=blocks(), heads=st.sampled_from(list(HEADS.values())))
def test_merged_blocks_and_their_backward_sum_up_to_dense_attention(
    kernel: Kernel, case: tuple[list[int], list[int], int, list[int]], heads: tuple[int, int]
) -> None:
    lengths, earlier, reaching, order = case
    own = causal(*torch.tensor(lengths).cumsum(0).tolist())
    before = sum(earlier)
    dout, q, k, v = inputs(rectangle(own.q_end, before + own.q_end), heads)
    mask = torch.cat((torch.zeros(own.q_end, before, dtype=torch.bool), allowed(own)), dim=1)
    mask[:reaching, :before] = True
    found = in_blocks(kernel, (dout, q, k, v), own, before, steps(earlier, order, reaching))
    assert_close(found, dense(dout, q, k, v, mask), 1e-10)


def steps(earlier: Sequence[int], order: Sequence[int], reaching: int) -> list[Tile]:
    """A rectangle for every earlier block of keys: [k_start, k_end) of all keys."""
    ends = torch.tensor(earlier).cumsum(0).tolist()
    return [Tile(0, reaching, ends[i] - earlier[i], ends[i]) for i in order]


def in_blocks(
    kernel: Kernel, tensors: tuple[Tensor, Tensor, Tensor, Tensor], own: Tile, offset: int, rectangles: list[Tile]
) -> dict[str, Tensor]:
    """As a ring rank does it: own keys, then merged rectangles; backward of each with the merged out and lse."""
    dout, q, k, v = tensors
    all_tiles = [Tile(0, own.q_end, offset, offset + own.q_end, own.documents), *rectangles]
    slices = [(slice(t.q_start, t.q_end), slice(t.k_start, t.k_end)) for t in all_tiles]
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=q.dtype)
    for tile, (part, keys) in zip(all_tiles, slices, strict=True):
        block = kernel.forward(q[part], k[keys], v[keys], tile, SCORE)
        if tile.causal:
            out[part], lse[part] = block
        else:
            merge_(out, lse, [(tile.q_start, *block)])
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for tile, (part, keys) in zip(all_tiles, slices, strict=True):
        shares = kernel.backward(dout[part], q[part], k[keys], v[keys], out[part], lse[part], tile, SCORE)
        for grad, where, share in zip(grads, (part, keys, keys), shares, strict=True):
            grad[where] += share
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def test_merging_is_in_place_and_touches_only_the_slice_it_is_given() -> None:
    out, lse, block = random(6, 2, 4), random(6, 2, seed=1), random(3, 2, 4, seed=2)
    before = out.clone(), lse.clone()
    merge_(out, lse, [(1, block, random(3, 2, seed=3))])
    for x, old in zip((out, lse), before, strict=True):
        assert torch.equal(x[0], old[0])
        assert torch.equal(x[4:], old[4:])
        assert not bool((x[1:4] == old[1:4]).any())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_merging_is_exact_where_one_side_has_no_weight(dtype: torch.dtype) -> None:
    for mine, theirs, winner in ((0.0, -math.inf, 0), (0.0, -1000.0, 0), (0.0, 1000.0, 1), (-1000.0, 1000.0, 1), (3e4, -3e4, 0)):
        out, block = random(3, 2, 4, dtype=dtype), random(3, 2, 4, dtype=dtype, seed=1)
        wanted = (out.clone(), block.clone())[winner]
        lse = torch.full((3, 2), mine, dtype=dtype)
        merge_(out, lse, [(0, block, torch.full((3, 2), theirs, dtype=dtype))])
        assert torch.equal(out, wanted)
        assert torch.equal(lse, torch.full((3, 2), max(mine, theirs), dtype=dtype))


def test_merging_a_bf16_block_accumulates_in_the_running_precision() -> None:
    out, block = random(5, 2, 4, dtype=torch.float32), random(5, 2, 4, dtype=torch.bfloat16, seed=1)
    lse, block_lse = random(5, 2, dtype=torch.float32, seed=2), random(5, 2, dtype=torch.float32, seed=3)
    weights = torch.stack((lse, block_lse)).double().softmax(0).unsqueeze(-1)
    wanted = {"out": weights[0] * out + weights[1] * block.double(), "lse": torch.logaddexp(lse.double(), block_lse.double())}
    merge_(out, lse, [(0, block, block_lse)])
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    assert_close({"out": out, "lse": lse}, wanted, 1e-6)


def test_several_blocks_at_once_from_a_low_precision_running_result() -> None:
    outs = [random(5, 2, 4, dtype=torch.bfloat16, seed=i) for i in range(3)]
    lses = [random(5, 2, dtype=torch.float32, seed=3 + i) for i in range(3)]
    weights = torch.stack(lses).double().softmax(0).unsqueeze(-1)
    wanted = {"out": (weights * torch.stack(outs).double()).sum(0), "lse": torch.stack(lses).double().logsumexp(0)}
    before, into = outs[0].clone(), torch.empty(5, 2, 4)
    merge_(outs[0], lses[0], [(0, *block) for block in zip(outs[1:], lses[1:], strict=True)], into)
    assert torch.equal(outs[0], before)
    assert_close({"out": into, "lse": lses[0]}, wanted, 1e-6)


def test_a_total_is_rounded_once() -> None:
    base = random(6, 2, 4, dtype=torch.bfloat16)
    parts = [(0, random(6, 2, 4, dtype=torch.bfloat16, seed=1)), (3, random(2, 2, 4, dtype=torch.bfloat16, seed=2))]
    wanted = base.double()
    for start, part in parts:
        wanted[start : start + len(part)] += part.double()
    assert torch.equal(total(base, parts, torch.bfloat16), wanted.bfloat16())
    assert torch.equal(total(base.double(), [], torch.float64), base.double())

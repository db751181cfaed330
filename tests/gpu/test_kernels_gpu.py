"""CUDA kernels, and the ring over them, against the fp32 reference: within twice the error of one plain bf16 kernel."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ds_cp import balance
from ds_cp import layout as layouts
from ds_cp.kernels import attention, blocked, choice, merge
from ds_cp.kernels.attention import Score, reference
from ds_cp.tiles import Tile
from tests.gpu import lockstep


def installed() -> list[str]:
    """CUDA kernels whose packages are there; flash_attn is the only one that may not be."""
    try:
        attention.load("flash_attn")
    except ValueError:
        return ["torch_flash", "torch_cudnn"]
    return ["torch_flash", "torch_cudnn", "flash_attn"]


KERNELS = installed()
HEAD_SIZES = [64, 80, 96, 128, 192, 256]
HEADS = {"MHA": (4, 4), "GQA": (8, 2), "MQA": (4, 1)}
DTYPE = torch.bfloat16


def causal(*bounds: int) -> Tile:
    return Tile(0, bounds[-1], 0, bounds[-1], (0, *bounds))


TILES = {
    "one document": causal(517),
    "documents": causal(100, 101, 102, 333, 640),
    "documents of one length": causal(300, 600, 900),
    "one-token documents": causal(*range(1, 9)),
    "wide rectangle": Tile(0, 130, 0, 517),
    "high rectangle": Tile(0, 517, 0, 130),
    "one query": Tile(0, 1, 0, 77),
}


def inputs(tokens: int, keys: int, heads: tuple[int, int], size: int) -> list[Tensor]:
    """dout, q, k, v; q, k, v are strided slices of longer rows, as the all-to-all leaves them."""
    generator = torch.Generator(device="cuda").manual_seed(tokens * 1000 + keys + size)
    shapes = [(tokens, heads[0]), (tokens, heads[0]), (keys, heads[1]), (keys, heads[1])]
    wide = [torch.randn(t, n + 3, size, device="cuda", generator=generator).to(DTYPE)[:, 1:-2] for t, n in shapes]
    return [wide[0].contiguous(), *wide[1:]]


def computed(kernel, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, tile: Tile, score: Score) -> dict[str, Tensor]:
    out, lse = kernel.forward(q, k, v, tile, score)
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, tile, score)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def exact(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, tile: Tile, score: Score) -> dict[str, Tensor]:
    return computed(reference, *(x.float() for x in (dout, q, k, v)), tile, score)


def in_plain_bf16(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, tile: Tile, score: Score) -> dict[str, Tensor]:
    """The yardstick: PyTorch's own SDPA in bf16, a document at a time, through autograd."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    spans = list(pairwise(tile.documents)) if tile.documents else [(None, None)]
    outs = []
    for start, end in spans:
        parts = [x[start:end].transpose(0, 1).unsqueeze(0) for x in leaves]
        one = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=tile.causal, scale=score.scale, enable_gqa=True)
        outs.append(one[0].transpose(0, 1))
    out = torch.cat(outs)
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, dout), strict=True))}


def error(found: Tensor, wanted: Tensor) -> float:
    """A share of the wanted norm; where that is nearly zero (one key, whose score has no gradient), of the size of one an entry."""
    assert found.shape == wanted.shape
    size = max(float(wanted.norm()), 1e-3 * wanted.numel() ** 0.5)
    return float((found.float() - wanted).norm()) / size


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_within_twice_the_error_of_plain_bf16(name: str, tile: Tile, size: int, heads: tuple[int, int]) -> None:
    kernel, score = attention.load(name), Score(size**-0.5)
    tensors = inputs(tile.q_end, tile.k_end, heads, size)
    if (name, size) == ("flash_attn", 80):
        assert "dq is wrong" in kernel.unsupported(*tensors[1:], tile, score)
        return
    assert kernel.unsupported(*tensors[1:], tile, score) is None
    wanted, plain = exact(*tensors, tile, score), in_plain_bf16(*tensors, tile, score)
    found = computed(kernel, *tensors, tile, score)
    assert found["lse"].dtype == torch.float32
    assert error(found["lse"], wanted["lse"]) <= 1e-4
    for part, value in plain.items():
        assert error(found[part], wanted[part]) <= 2 * error(value, wanted[part]) + 1e-6, part


def band(queries: int, keys: int, window: int) -> Tile:
    return Tile(0, queries, 0, keys, window=window, ahead=keys)


WINDOWED = {
    "window": replace(causal(517), window=100),
    "window of documents": replace(causal(100, 101, 333, 640), window=129),
    "window 1": replace(causal(300), window=1),
    "band": band(127, 127, 128),
    "band of a document that begins": band(300, 30, 301),
}
CAPPED = [name for name in KERNELS if name == "flash_attn"]


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("tile", WINDOWED.values(), ids=WINDOWED)
@pytest.mark.parametrize("name", KERNELS)
def test_windows_and_softcap_are_within_twice_the_error_of_eager_bf16(
    name: str, tile: Tile, size: int, softcap: float | None
) -> None:
    kernel, score = attention.load(name), Score(size**-0.5, softcap)
    tensors = inputs(tile.q_end, tile.k_end, (8, 2), size)
    if (
        name == "torch_cudnn"
        or (softcap and name not in CAPPED)
        or (name == "torch_flash" and not tile.causal and tile.q_end > tile.k_end)
    ):
        assert "use " in kernel.unsupported(*tensors[1:], tile, score)
        return
    assert kernel.unsupported(*tensors[1:], tile, score) is None
    wanted, found = exact(*tensors, tile, score), computed(kernel, *tensors, tile, score)
    plain = eager(*tensors, seen(tile), score)
    assert error(found["lse"], wanted["lse"]) <= 1e-4
    rounding = 1e-2 if tile.window == 1 else 1e-6  # the gradient of one key's score is zero, but for the rounding of fp32 sums
    for part, value in plain.items():
        assert error(found[part], wanted[part]) <= 2 * error(value, wanted[part]) + rounding, part


def seen(tile: Tile) -> Tensor:
    """[queries, keys]: who attends whom."""
    queries, keys = torch.arange(tile.q_end, device="cuda")[:, None], torch.arange(tile.k_end, device="cuda")
    distance = queries - keys + tile.ahead
    allowed = distance < (tile.window or 1 << 30)
    if tile.documents is not None:
        bounds = torch.tensor(tile.documents, device="cuda")
        allowed &= (distance >= 0) & (torch.bucketize(queries, bounds, right=True) == torch.bucketize(keys, bounds, right=True))
    return allowed


def eager(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    score: Score,
    sink: Tensor | None = None,
    dtype: torch.dtype = DTYPE,
) -> dict[str, Tensor]:
    """Attention as transformers writes it out, through autograd: products in `dtype`, the softmax in fp32."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)] + ([] if sink is None else [sink.detach().requires_grad_()])
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1).transpose(0, 1) for x in leaves[1:3])
    scores = leaves[0].transpose(0, 1) @ keys.mT * score.scale
    if score.softcap is not None:
        scores = torch.tanh(scores / score.softcap) * score.softcap
    scores = scores.masked_fill(~allowed, float("-inf")).float()
    if sink is not None:
        scores = torch.cat((scores, leaves[3].float()[:, None, None].expand(-1, len(q), 1)), -1)
    p = scores.softmax(-1).nan_to_num(0.0)  # a query without a key
    p = p if sink is None else p[..., :-1]
    out = (p.to(dtype) @ values).transpose(0, 1)
    grads = torch.autograd.grad(out, leaves, dout.to(dtype))
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv", "dsink"), grads, strict=False))}


PACKED = (0, 100, 101, 1240, 2048)


@pytest.mark.parametrize("window", [65, 300, 1000])
@pytest.mark.parametrize("sink", [False, True], ids=["no sink", "sink"])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("ring", [2, 8])
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "torch_cudnn"])
def test_a_windowed_ring_is_within_twice_the_error_of_eager_bf16(
    name: str, ring: int, softcap: float | None, sink: bool, window: int, monkeypatch
) -> None:
    if softcap and name not in CAPPED:
        return  # refused, see above
    check_ring(name, ring, softcap, sink, window, monkeypatch)


@pytest.mark.parametrize("sink", [False, True], ids=["no sink", "sink"])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("ring", [2, 8])
@pytest.mark.parametrize("layout", ["zigzag", "balanced"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_ring_with_sinks_and_softcap_is_within_twice_the_error_of_eager_bf16(
    name: str, layout: str, ring: int, softcap: float | None, sink: bool, monkeypatch
) -> None:
    if softcap and name not in CAPPED:
        return
    check_ring(name, ring, softcap, sink, None, monkeypatch, layout)


def check_ring(
    name: str, ring: int, softcap: float | None, sink: bool, window: int | None, monkeypatch, layout: str = "zigzag"
) -> None:
    kernel, score = attention.load(name), Score(128**-0.5, softcap)
    plan = layouts.build(layout, PACKED[-1], ring, 1, PACKED)
    documents = tuple(balance.padded(PACKED, plan.length))
    tensors = inputs(plan.length, plan.length, (8, 2), 128)
    sinks = torch.linspace(-2, 3, 8, device="cuda") if sink else None
    allowed = seen(Tile(0, plan.length, 0, plan.length, documents, window))
    wanted = eager(*tensors, allowed, score, sinks, torch.float32)
    plain = eager(*tensors, allowed, score, sinks)
    found = lockstep.ring(*tensors, documents, ring, kernel, score, monkeypatch, plan=plan, window=window, sink=sinks, lanes=True)
    assert found.keys() == wanted.keys()
    for part, value in found.items():
        assert error(value, wanted[part]) <= 2 * error(plain[part], wanted[part]) + 1e-6, part


@pytest.mark.parametrize("tokens", [2048, 8192])
@pytest.mark.parametrize("ring", [4, 8])
@pytest.mark.parametrize("name", [*KERNELS, "auto"])
def test_a_balanced_ring_is_within_twice_the_error_of_one_kernel(name: str, ring: int, tokens: int, monkeypatch) -> None:
    """Several rectangles a step, hops that end early."""
    kernel, score = choice.resolve(name, "cuda", torch.cuda.get_device_capability()[0]), Score(128**-0.5)
    bounds = (0, tokens // 2, *(tokens * part // 16 for part in (9, 10, 13)), tokens - 1, tokens)
    plan = layouts.build("balanced", tokens, ring, 1, bounds)
    documents = tuple(balance.padded(bounds, plan.length))
    tensors = inputs(plan.length, plan.length, (8, 2), 128)
    tile = Tile(0, plan.length, 0, plan.length, documents)
    wanted, alone = exact(*tensors, tile, score), computed(kernel, *tensors, tile, score)
    found = lockstep.ring(*tensors, documents, ring, kernel, score, monkeypatch, plan=plan, lanes=True)
    for part, value in found.items():
        assert error(value, wanted[part]) <= 2 * error(alone[part], wanted[part]), part


@pytest.mark.parametrize("heads", [(8, 2), (4, 4)], ids=["GQA", "MHA"])
@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("ring", [2, 4, 8])
@pytest.mark.parametrize("gathered", [False, True], ids=["p2p", "allgather"])
@pytest.mark.parametrize("documents", [(0, 2048), (0, 100, 101, 102, 1240, 2000, 2048), (0, 5120)], ids=["one", "packed", "long"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_ring_is_within_twice_the_error_of_one_kernel(
    name: str, documents, gathered: bool, ring: int, size: int, heads: tuple[int, int], monkeypatch
) -> None:
    kernel, score = attention.load(name), Score(size**-0.5)
    tensors = inputs(documents[-1], documents[-1], heads, size)
    tile = Tile(0, documents[-1], 0, documents[-1], documents)
    wanted, alone = exact(*tensors, tile, score), computed(kernel, *tensors, tile, score)
    found = lockstep.ring(*tensors, documents, ring, kernel, score, monkeypatch, gathered, lanes=True)
    for part, value in found.items():
        assert error(value, wanted[part]) <= 2 * error(alone[part], wanted[part]), part


@pytest.mark.parametrize("runs", [False, True], ids=["one run", "three runs"])
@pytest.mark.parametrize("plain", [False, True], ids=["own form", "plain"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("size", [size for size in HEAD_SIZES if size != 80])
@pytest.mark.parametrize("name", [name for name in KERNELS if hasattr(attention.load(name), "sums")])
def test_a_kernels_own_sums_are_within_twice_the_error_of_plain_bf16(
    name: str, size: int, heads: tuple[int, int], plain: bool, runs: bool
) -> None:
    """Causal own keys; others in three tiles, of which one is small and one begins within a block."""
    kernel, score = attention.load(name), Score(size**-0.5)
    own, others = Tile(0, 700, 0, 700, (0, 700)), [Tile(0, 700, 0, 384), Tile(0, 700, 384, 510), Tile(0, 700, 510, 800)]
    dout, q, k, v = inputs(700, 1500, heads, size)
    wanted, out, lse = masked(dout, q, k, v, score.scale, torch.float32)
    rounded, *_ = masked(dout, q, k, v, score.scale, DTYPE)
    sums = kernel.sums(dout, q, out.to(DTYPE), lse, heads[1], [own, *others], score)
    starts = (0, 384, 510) if runs else (0,)
    make = sums.plain if plain else partial(sums.new, starts=[starts])
    home, away = sums.plain(700) if plain else sums.new(700), [make(800) for _ in range(2)]
    sums.add(home, own, k[800:], v[800:])
    for number, tile in enumerate(others):
        sums.add(away[number % 2], tile, k[:800], v[:800], starts)
    dk, dv = torch.cat((sums.dkv(away, 800, DTYPE, starts), sums.dkv([home], 700, DTYPE)), dim=1)
    for part, value in {"dq": sums.dq(), "dk": dk, "dv": dv}.items():
        assert error(value, wanted[part]) <= 2 * error(rounded[part], wanted[part]) + 1e-6, part


Masked = tuple[dict[str, Tensor], Tensor, Tensor]


def masked(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype) -> Masked:
    """Gradients of queries that stand at the end of their keys, in plain operations; out and lse."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in leaves[1:])
    scores = torch.einsum("tnh,snh->nts", leaves[0], keys) * scale
    behind = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu(len(k) - len(q) + 1)
    scores = scores.masked_fill(behind, float("-inf"))
    out = torch.einsum("nts,snh->tnh", scores.softmax(-1), values)
    grads = torch.autograd.grad(out, leaves, dout.to(dtype))
    lse = scores.detach().float().logsumexp(-1).transpose(0, 1)
    return dict(zip(("dq", "dk", "dv"), grads, strict=True)), out.detach(), lse


@pytest.mark.parametrize("size", [96, 128])
@pytest.mark.parametrize("name", KERNELS)
def test_deterministic_algorithms_give_the_same_bits_twice(name: str, size: int) -> None:
    kernel, tile = attention.load(name), causal(700, 1500)
    tensors = inputs(1500, 1500, (8, 2), size)
    torch.use_deterministic_algorithms(True)
    try:
        once, twice = (computed(kernel, *tensors, tile, Score(size**-0.5)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for part, value in once.items():
        assert torch.equal(value, twice[part]), part


@pytest.mark.parametrize("low", [False, True], ids=["running fp32", "running bf16"])
@pytest.mark.parametrize("count", [1, 2, 5, 7, 11])
@pytest.mark.parametrize("size", [64, 80, 192])
def test_the_fused_merge_is_the_reference(size: int, count: int, low: bool) -> None:
    generator = torch.Generator(device="cuda").manual_seed(size)
    wide = torch.randn(count + 1, 333, 7, size, device="cuda", generator=generator)
    scores = 20 * torch.randn(count + 1, 7, 333, device="cuda", generator=generator)
    scores[1, 0, :50] = float("-inf")  # a block without a key for these queries
    running, lse = wide[0][5:300, 1:6], scores[0][1:6, 5:300].transpose(0, 1)
    running = running.to(DTYPE) if low else running
    blocks = []
    for i in range(count):
        start, end = (0, 295) if i % 3 == 0 else (17 * (i % 7), 295 - 31 * (i % 7))
        out, block_lse = wide[i + 1][5 + start : 5 + end, 1:6], scores[i + 1][1:6, 5 + start : 5 + end].transpose(0, 1)
        blocks.append((start, out.to(DTYPE), block_lse))
    wanted, wanted_lse = torch.empty_like(running, dtype=torch.float64), lse.double()
    merge.merge_reference_(running.double(), wanted_lse, [(a, out.double(), x.double()) for a, out, x in blocks], wanted)
    before = wide[0].clone()
    into = torch.empty_like(running, dtype=torch.float32) if low else None
    in_place, in_place_lse = running.clone(), lse.clone()
    merge.merge_(running, lse, blocks, into)
    found = running if into is None else into
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-6, atol=2e-6)
    before[5:300, 1:6] = before[5:300, 1:6] if low else running
    assert torch.equal(before, wide[0]), "wrote outside the slice"
    merge.merge_(in_place, in_place_lse, blocks)  # rounded once, to whatever the running result is in
    assert torch.equal(in_place, found.to(in_place.dtype))


SPANS = [[(0, 300)], [(0, 300), (150, 300)], [(20, 90), (150, 211)], [(0, 300)] * 6 + [(16, 17), (150, 300), (299, 300)]]


@pytest.mark.parametrize("spans", SPANS, ids=str)
def test_the_fused_total_is_the_reference(spans: list[tuple[int, int]]) -> None:
    generator = torch.Generator(device="cuda").manual_seed(3)
    base = torch.randn(300, 7, 80, device="cuda", generator=generator).to(DTYPE)[:, 1:6]
    parts = [(a, torch.randn(b - a, 5, 80, device="cuda", generator=generator).to(DTYPE)) for a, b in spans]
    wanted = merge.total(base.cpu(), [(a, part.cpu()) for a, part in parts], torch.float32)
    assert torch.equal(merge.total(base, parts, torch.float32).cpu(), wanted)


@pytest.mark.parametrize("starts", [(0,), (0, 13), (0, 5, 48, 49, 120)], ids=str)
@pytest.mark.parametrize("size", [64, 96])
def test_fused_blocked_sums_are_the_reference(size: int, starts: tuple[int, ...]) -> None:
    elements, generator = 48 * 128, torch.Generator().manual_seed(size)
    place = torch.randperm(elements, generator=generator).view(48, 128)[:, :size].int().contiguous()
    here = torch.zeros(2, 2, 3, blocked.blocks(starts, 150, 48) * elements)
    there = here.cuda()
    for number, (start, keys) in enumerate([(0, 150), (13, 70), (48, 1)]):
        dk, dv = torch.randn(2, keys, 4, size, generator=generator).to(DTYPE)[:, :, 1:]
        blocked.add_(here[number % 2], place, elements, starts, start, dk, dv, 4.0)
        blocked.add_(there[number % 2], place.cuda(), elements, starts, start, dk.cuda(), dv.cuda(), 4.0)
    assert torch.equal(there.cpu(), here)
    own = tuple(torch.randn(2, 150, 4, size, generator=generator).to(DTYPE)[:, :, 1:])
    for count, dtype, more in ((1, DTYPE, None), (2, DTYPE, None), (2, torch.float32, None), (2, torch.float32, own)):
        last = starts, 150, 0.25, dtype
        wanted = blocked.plain(list(here[:count]), place, elements, *last, more)
        found = blocked.plain(list(there[:count]), place.cuda(), elements, *last, more and tuple(x.cuda() for x in more))
        assert torch.equal(found.cpu(), wanted)


def test_unsupported_gives_the_reason_and_the_way_out() -> None:
    x = torch.zeros(4, 2, 64, device="cuda")
    kernel = attention.load("torch_flash")
    assert "enable bf16" in kernel.unsupported(x, x, x, causal(4), Score(0.1))
    assert "use torch_cpu" in kernel.unsupported(x.cpu(), x.cpu(), x.cpu(), causal(4), Score(0.1))
    odd = x.to(DTYPE)[..., :60]
    assert "multiple of 8" in kernel.unsupported(odd, odd, odd, causal(4), Score(0.1))

"""CUDA kernels, and the ring over them, against the fp32 reference: within twice the error of one plain bf16 kernel."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ds_cp.kernels import attention, merge
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
    assert found.shape == wanted.shape
    return float((found.float() - wanted).norm() / wanted.norm().clamp(min=1e-6))


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
def test_windows_and_softcap_are_within_four_times_the_rounding_of_bf16(
    name: str, tile: Tile, size: int, softcap: float | None
) -> None:
    """PyTorch's bf16 attention has neither, so the yardstick is bf16's own rounding, 2^-8, of the written-out reference."""
    kernel, score = attention.load(name), Score(size**-0.5, softcap)
    tensors = inputs(tile.q_end, tile.k_end, (8, 2), size)
    if name == "torch_cudnn" or (softcap and name not in CAPPED):
        assert "use " in kernel.unsupported(*tensors[1:], tile, score)
        return
    assert kernel.unsupported(*tensors[1:], tile, score) is None
    wanted, found = exact(*tensors, tile, score), computed(kernel, *tensors, tile, score)
    for part, value in wanted.items():
        assert error(found[part], value) <= 4 * 2**-8, part


@pytest.mark.parametrize("window", [65, 300, 1000])
@pytest.mark.parametrize("ring", [2, 8])
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "torch_cudnn"])
def test_a_windowed_ring_is_within_twice_the_error_of_one_kernel(name: str, ring: int, window: int, monkeypatch) -> None:
    kernel, score, documents = attention.load(name), Score(0.1), (0, 100, 101, 1240, 2048)
    tensors = inputs(2048, 2048, (8, 2), 128)
    tile = Tile(0, 2048, 0, 2048, documents, window)
    wanted, alone = exact(*tensors, tile, score), computed(kernel, *tensors, tile, score)
    found = lockstep.ring(*tensors, documents, ring, kernel, score, monkeypatch, window=window)
    for part, value in found.items():
        assert error(value, wanted[part]) <= 2 * error(alone[part], wanted[part]) + 1e-6, part


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("ring", [2, 4, 8])
@pytest.mark.parametrize("gathered", [False, True], ids=["p2p", "allgather"])
@pytest.mark.parametrize("documents", [(0, 2048), (0, 100, 101, 102, 1240, 2000, 2048)], ids=["one", "packed"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_ring_is_within_twice_the_error_of_one_kernel(
    name: str, documents, gathered: bool, ring: int, size: int, monkeypatch
) -> None:
    kernel, score = attention.load(name), Score(size**-0.5)
    tensors = inputs(documents[-1], documents[-1], (8, 2), size)
    tile = Tile(0, documents[-1], 0, documents[-1], documents)
    wanted, alone = exact(*tensors, tile, score), computed(kernel, *tensors, tile, score)
    found = lockstep.ring(*tensors, documents, ring, kernel, score, monkeypatch, gathered)
    for part, value in found.items():
        assert error(value, wanted[part]) <= 2 * error(alone[part], wanted[part]), part


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("size", [size for size in HEAD_SIZES if size != 80])
@pytest.mark.parametrize("name", [name for name in KERNELS if hasattr(attention.load(name), "accumulate")])
def test_dq_summed_over_tiles_is_within_twice_the_error_of_plain_bf16(name: str, size: int, heads: tuple[int, int]) -> None:
    kernel, score, tile = attention.load(name), Score(size**-0.5), Tile(0, 700, 0, 1500)
    dout, q, k, v = inputs(700, 1500, heads, size)
    wanted, plain = exact(dout, q, k, v, tile, score), in_plain_bf16(dout, q, k, v, tile, score)
    out, lse = kernel.forward(q, k, v, tile, score)
    sums = kernel.accumulate(dout, q, k, v, out, lse, tile, score)
    parts = [sums.backward(k[span], v[span]) for span in (slice(0, 600), slice(600, 1500))]
    dk, dv = torch.cat(parts, dim=1)
    found = {"dq": sums.dq(), "dk": dk, "dv": dv}
    for part, value in found.items():
        assert error(value, wanted[part]) <= 2 * error(plain[part], wanted[part]) + 1e-6, part


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
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("size", [64, 80, 192])
def test_the_fused_merge_is_the_reference(size: int, count: int, low: bool) -> None:
    generator = torch.Generator(device="cuda").manual_seed(size)
    wide = torch.randn(3, 333, 7, size, device="cuda", generator=generator)
    scores = 20 * torch.randn(3, 7, 333, device="cuda", generator=generator)
    scores[1, 0, :50] = float("-inf")  # a block without a key for these queries
    outs, lses = [x[5:300, 1:6] for x in wide], [x[1:6, 5:300].transpose(0, 1) for x in scores]
    running = outs[0].to(DTYPE) if low else outs[0]
    blocks = [(out.to(DTYPE), lse) for out, lse in zip(outs[1:], lses[1:], strict=True)][:count]
    wanted, wanted_lse = torch.empty_like(running, dtype=torch.float64), lses[0].double()
    merge.merge_reference_(running.double(), wanted_lse, [(out.double(), lse.double()) for out, lse in blocks], wanted)
    before = wide[0].clone()
    into = torch.empty_like(running, dtype=torch.float32) if low else None
    merge.merge_(running, lses[0], blocks, into)
    found = running if into is None else into
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lses[0].double(), wanted_lse, rtol=1e-6, atol=1e-6)
    before[5:300, 1:6] = before[5:300, 1:6] if low else running
    assert torch.equal(before, wide[0]), "wrote outside the slice"


@pytest.mark.parametrize("spans", [[(0, 300)], [(0, 300), (150, 300)], [(20, 90), (150, 211)]], ids=str)
def test_the_fused_total_is_the_reference(spans: list[tuple[int, int]]) -> None:
    generator = torch.Generator(device="cuda").manual_seed(3)
    base = torch.randn(300, 7, 80, device="cuda", generator=generator).to(DTYPE)[:, 1:6]
    parts = [(a, torch.randn(b - a, 5, 80, device="cuda", generator=generator).to(DTYPE)) for a, b in spans]
    wanted = merge.total(base.cpu(), [(a, part.cpu()) for a, part in parts], torch.float32)
    assert torch.equal(merge.total(base, parts, torch.float32).cpu(), wanted)


def test_unsupported_gives_the_reason_and_the_way_out() -> None:
    x = torch.zeros(4, 2, 64, device="cuda")
    kernel = attention.load("torch_flash")
    assert "enable bf16" in kernel.unsupported(x, x, x, causal(4), Score(0.1))
    assert "use torch_cpu" in kernel.unsupported(x.cpu(), x.cpu(), x.cpu(), causal(4), Score(0.1))
    odd = x.to(DTYPE)[..., :60]
    assert "multiple of 8" in kernel.unsupported(odd, odd, odd, causal(4), Score(0.1))

"""What `attention_kernel: auto` hands to which kernel. The kernels are real modules or names; no GPU is needed to choose."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ds_cp.kernels import attention, choice
from ds_cp.kernels.attention import Score, reference, torch_cpu
from ds_cp.tiles import Tile

SCORE = Score(0.1)
PLAIN = SimpleNamespace(__name__="plain", unsupported=lambda *_: None)


def heads(tokens: int, count: int = 32, size: int = 128) -> Tensor:
    return torch.empty(tokens, count, size, device="meta")


def rectangle(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor, Tile]:
    return heads(queries), heads(keys, 8), heads(keys, 8), Tile(0, queries, 0, keys)


def documents(*bounds: int) -> tuple[Tensor, Tensor, Tensor, Tile]:
    x = heads(bounds[-1], 8)
    return heads(bounds[-1]), x, x, Tile(0, bounds[-1], 0, bounds[-1], (0, *bounds))


def large(launched: bool = True, reason: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(__name__="large", VERSION=4, unsupported=lambda *_: reason, launched=lambda tile: launched)


def test_flops_count_pairs_of_queries_and_keys_they_attend() -> None:
    q, _, _, tile = rectangle(300, 500)
    assert choice.flops(q, tile) == 4 * 300 * 500 * 32 * 128
    q, _, _, tile = documents(2, 5)
    assert choice.flops(q, tile) == 4 * (3 + 6) * 32 * 128


@pytest.mark.parametrize(("launched", "direction", "wanted"), [(True, 0, "large"), (True, 1, "plain"), (False, 0, "plain")])
def test_small_tiles_go_to_the_plain_kernel_unless_launched_directly(launched: bool, direction: int, wanted: str) -> None:
    auto = choice.Auto(large(launched), PLAIN, plans=False)
    assert auto.choose(*rectangle(512, 512), SCORE, direction).__name__ == wanted


@pytest.mark.parametrize("direction", [0, 1])
def test_large_tiles_go_to_flash_attn_and_what_it_refuses_does_not(direction: int) -> None:
    assert choice.Auto(large(), PLAIN, plans=False).choose(*rectangle(8192, 8192), SCORE, direction).__name__ == "large"
    refusing = choice.Auto(large(reason="no"), PLAIN, plans=False)
    assert refusing.choose(*rectangle(8192, 8192), SCORE, direction).__name__ == "plain"


@pytest.mark.parametrize(("reason", "wanted"), [(None, "sums"), ("its dq is wrong", None)])
def test_gradients_are_not_summed_by_a_kernel_that_refuses_the_heads(reason: str | None, wanted: str | None) -> None:
    kernel = large(reason=reason)
    kernel.sums = lambda *_, others: "sums"
    q, k, _, tile = rectangle(8192, 8192)
    given = q, q, q, q[..., 0], k.shape[1], [tile], SCORE
    assert choice.Auto(kernel, PLAIN, plans=False).sums(*given) == wanted


def test_a_shape_earns_its_plan_by_the_time_it_would_have_saved() -> None:
    auto = choice.Auto(large(), PLAIN, plans=True)
    q, k, v, tile = rectangle(16384, 8192)
    saved = choice.PICOSECONDS_SAVED[128][0] * 1e-12 * choice.flops(q, tile)
    calls = 0
    while auto.choose(q, k, v, tile, SCORE, 0) is PLAIN:
        calls += 1
    assert (calls - 1) * saved < choice.PLAN_SECONDS
    assert calls * saved >= choice.PLAN_SECONDS
    assert auto.choose(q, k, v, tile, SCORE, 1) is PLAIN, "a plan is for one direction"
    assert auto.choose(*rectangle(16384, 8191), SCORE, 0) is PLAIN, "and for one shape"


def test_what_the_plain_kernel_refuses_goes_to_the_large_one_whatever_its_size() -> None:
    refusing = SimpleNamespace(__name__="plain", unsupported=lambda q, k, v, tile, score: score.softcap and "it has no softcap")
    auto = choice.Auto(large(), refusing, plans=False)
    assert auto.choose(*rectangle(5, 5), Score(0.1, 50.0), 1).__name__ == "large"
    assert auto.choose(*rectangle(5, 5), SCORE, 1).__name__ == "plain"
    assert auto.unsupported(*rectangle(5, 5), Score(0.1, 50.0)) is None
    assert (
        choice.Auto(large(reason="nor has it"), refusing, plans=False).unsupported(*rectangle(5, 5), Score(0.1, 50.0))
        == "nor has it"
    )


def test_documents_never_earn_a_plan() -> None:
    auto = choice.Auto(large(), PLAIN, plans=True)
    assert all(auto.choose(*documents(9000, 16384), SCORE, 0) is PLAIN for _ in range(1000))


def test_on_cpu_auto_is_torch_cpu_and_cuda_kernels_are_refused() -> None:
    assert choice.resolve("auto", "cpu", None) is torch_cpu
    assert choice.resolve("auto", "cpu", None, softcap=True) is reference
    assert choice.resolve("torch_cpu", "cpu", None, softcap=True) is torch_cpu, "which then refuses by itself"
    for name in set(attention.names()) - {"torch_cpu", "reference"}:
        with pytest.raises(ValueError, match=f"'{name}' does not run on cpu"):
            choice.resolve(name, "cpu", None)
    with pytest.raises(ValueError, match="'torch_cpu' does not run on cuda"):
        choice.resolve("torch_cpu", "cuda", 9)


def test_ranks_differ_where_the_form_of_their_sums_does() -> None:
    kernel = large()
    plain = choice.identity(choice.Auto(kernel, PLAIN, plans=False))
    kernel.SUMS = "flash-attn 4.5"
    assert choice.identity(choice.Auto(kernel, PLAIN, plans=False)) == f"{plain}, with the sums of flash-attn 4.5"
    assert choice.identity(torch_cpu) == "torch_cpu"


def test_the_choice_is_described_in_one_phrase() -> None:
    assert choice.describe(torch_cpu) == "torch_cpu"
    assert choice.describe(choice.Auto(large(), PLAIN, plans=True)) == "large for shapes that recur, plain for the rest"


def test_hops_shorter_than_measured_ones_are_gathered() -> None:
    """Of a ring rank with T tokens: T x T / 2 pairs a hop."""
    tokens = choice.gathered_tokens(32, 128, "cuda")
    assert 4 * 32 * 128 * tokens**2 / 2 <= choice.HOP_FLOPS < 4 * 32 * 128 * (tokens + 1) ** 2 / 2
    assert choice.gathered_tokens(8, 128, "cuda") in (2 * tokens, 2 * tokens + 1), "as much work with a quarter of the heads"
    assert choice.gathered_tokens(32, 128, "cpu") == 0

"""The check of a kernel before training: silent about those that are right, and not about what a wrong one would do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_cp.kernels import attention, probe
from ds_cp.kernels.attention import Score
from ds_cp.kernels.choice import Auto
from ds_cp.tiles import Tile

CPU = torch.device("cpu")
PLAIN = probe.Asked(query_heads=4, kv_heads=2, head_size=16, windows=(None,), softcap=None, rectangles=True)
WINDOWED = probe.Asked(query_heads=4, kv_heads=1, head_size=16, windows=(None, 40, 4096, 1), softcap=None, rectangles=True)
CAPPED = probe.Asked(query_heads=2, kv_heads=2, head_size=24, windows=(None, 40), softcap=2.0, rectangles=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("asked", [PLAIN, WINDOWED, CAPPED], ids=["plain", "windows", "softcap"])
@pytest.mark.parametrize("name", ["reference", "torch_cpu"])
def test_a_kernel_that_is_right_passes(name: str, asked: probe.Asked, dtype: torch.dtype) -> None:
    assert probe.wrong(attention.load(name), asked, dtype, CPU) is None


def broken(**changes: Any) -> Any:
    """The CPU kernel with one function replaced."""
    right = attention.load("torch_cpu")
    names = ("unsupported", "forward", "backward")
    return SimpleNamespace(__name__="kernels.broken", **{**{name: getattr(right, name) for name in names}, **changes})


def forward(q: Tensor, k: Tensor, v: Tensor, tile: Tile, score: Score) -> tuple[Tensor, Tensor]:
    return attention.load("torch_cpu").forward(q, k, v, tile, score)


def backward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return attention.load("torch_cpu").backward(*given)


def without_documents(q: Tensor, k: Tensor, v: Tensor, tile: Tile, score: Score) -> tuple[Tensor, Tensor]:
    whole = tile.documents and (0, tile.documents[-1])
    return forward(q, k, v, Tile(tile.q_start, tile.q_end, tile.k_start, tile.k_end, whole, tile.window, tile.ahead), score)


def without_window(q: Tensor, k: Tensor, v: Tensor, tile: Tile, score: Score) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, Tile(tile.q_start, tile.q_end, tile.k_start, tile.k_end, tile.documents), score)


def one_key_more(q: Tensor, k: Tensor, v: Tensor, tile: Tile, score: Score) -> tuple[Tensor, Tensor]:
    window = tile.window and tile.window + 20
    return forward(q, k, v, Tile(tile.q_start, tile.q_end, tile.k_start, tile.k_end, tile.documents, window, tile.ahead), score)


def log2_lse(*given: Any) -> tuple[Tensor, Tensor]:
    out, lse = forward(*given)
    return out, lse * 1.4426950408889634


def doubled_dk(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = backward(*given)
    return dq, 2 * dk, dv


def wrong_heads(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = backward(*given)
    return dq, dk.flip(1), dv


BROKEN = {
    "documents leak": ({"forward": without_documents}, PLAIN, "out|lse"),
    "window ignored": ({"forward": without_window}, WINDOWED, "out|lse"),
    "window too wide": ({"forward": one_key_more}, WINDOWED, "out|lse"),
    "lse of another base": ({"forward": log2_lse}, PLAIN, "lse"),
    "a gradient scaled": ({"backward": doubled_dk}, PLAIN, "dk"),
    "heads mixed up": ({"backward": wrong_heads}, PLAIN, "dk"),
    "NaN": ({"backward": lambda *given: (*backward(*given)[:2], float("nan") * backward(*given)[2])}, PLAIN, "dv"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_kernel_that_is_wrong_does_not(case: str) -> None:
    changes, asked, what = BROKEN[case]
    reason = probe.wrong(broken(**changes), asked, torch.float32, CPU)
    assert reason is not None
    assert reason.split(" computes ")[0] == "broken"
    assert reason.split(" computes ")[1].split()[0] in what.split("|"), reason


def test_both_kernels_of_auto_are_asked() -> None:
    right, wrong = attention.load("torch_cpu"), broken(forward=log2_lse)
    for auto in (Auto(right, wrong, plans=False), Auto(wrong, right, plans=False)):
        assert "broken computes lse wrong" in probe.wrong(auto, PLAIN, torch.float32, CPU)


def test_what_a_kernel_refuses_is_not_asked() -> None:
    refusing = broken(unsupported=lambda *_: "not here", forward=log2_lse)
    assert probe.wrong(refusing, PLAIN, torch.float32, CPU) is None


def test_what_a_kernel_will_not_compute_is_known_before_training() -> None:
    assert probe.refused(attention.load("torch_cpu"), PLAIN, torch.float32, CPU) is None
    assert "no softcap; use reference" in str(probe.refused(attention.load("torch_cpu"), CAPPED, torch.float32, CPU))

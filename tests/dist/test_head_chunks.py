"""Heads that go through the all-to-all in groups change no gradient: fp64 against written-out scores, fp32 against HF's model."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist import jobs
from tests.dist.test_api import refused
from tests.dist.test_parity import assert_parity, block, packed


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize(("mesh", "chunks"), [((2, 1), 2), ((2, 1), 4), ((2, 2), 2), ((2, 2), 4), ((4, 1), 2)])
def test_out_and_every_gradient_in_fp64(pool, mesh: tuple[int, int], chunks: int, window: int | None) -> None:
    """With sinks and windows; groups of whole key/value heads and groups that share one."""
    run: dict[str, Any] = {"ulysses": mesh[0], "ring": mesh[1], "window": window, "head_chunks": chunks}
    for error in pool(mesh[0] * mesh[1]).run(jobs.sink_error, **run):
        assert error <= 1e-10


@pytest.mark.parametrize(("mesh", "chunks", "stage"), [((2, 1), 4, 0), ((2, 2), 2, 3), ((4, 1), 2, 2), ((2, 2), 4, 1)])
def test_a_model_of_packed_rows(pool, mesh: tuple[int, int], chunks: int, stage: int) -> None:
    run = {
        "block": block(*mesh, attention_head_chunks=chunks, ring_keep=chunks == 2),
        "batches": [packed([13, 1, 1, 22, 5, 1, 20, 2])],
    }
    assert_parity(pool(mesh[0] * mesh[1]).run(jobs.parity, model_type="llama", stage=stage, checkpointing=stage == 3, **run))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_key_value_heads_that_several_ranks_hold(pool, kv_heads: int) -> None:
    run = {"block": block(4, 1, attention_head_chunks=2), "changes": {"num_key_value_heads": kv_heads}}
    assert_parity(pool(4).run(jobs.parity, model_type="llama", stage=3, **run))


def test_everything_that_saves_memory_at_once(pool) -> None:
    """activation_offload makes "auto" as many groups as there are heads."""
    words = {"tiled_mlp": True, "activation_offload": True, "loss_chunk": 37}
    run = {"model_type": "llama", "block": block(2, 2, **words), "length": 300, "accumulation": 2, "checkpointing": True}
    assert_parity(pool(4).run(jobs.parity, stage=3, **run))


def test_groups_that_heads_do_not_make_are_refused(pool) -> None:
    message = refused(pool(2), jobs.parity, model_type="llama", stage=0, block=block(2, 1, attention_head_chunks=3))
    assert message.endswith("attention_head_chunks: 3: it does not divide the 4 query heads of a rank; use one of [1, 2, 4]")
    message = refused(pool(2), jobs.parity, model_type="llama", stage=0, block=block(1, 2, attention_head_chunks=2))
    assert message.endswith("attention_head_chunks: 2: there is no all-to-all with ulysses_size 1; use one of [1]")

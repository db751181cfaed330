"""MLPs in tiles and layer inputs on the host change no gradient: every parameter against HF's own model in one process."""

from __future__ import annotations

import pytest

from tests.dist import jobs
from tests.dist.test_api import refused
from tests.dist.test_parity import assert_parity, block, masked

LENGTH = 300  # the tiny models' hidden size, and with it a tile, is 64 tokens: a shard of 150 has three, one of them short


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not_reentrant"])
def test_every_stage_with_and_without_checkpointing(pool, checkpointing: bool | None, stage: int) -> None:
    words = {"tiled_mlp": True, "loss_chunk": 37, "activation_offload": checkpointing is not None}
    run = {"model_type": "llama", "block": block(1, 2, **words), "length": LENGTH, "accumulation": 1 + (stage == 3)}
    assert_parity(pool(2).run(jobs.parity, stage=stage, checkpointing=checkpointing, **run))


@pytest.mark.parametrize("model_type", ["gpt_neox", "phi3", "gemma"])
def test_other_mlps(pool, model_type: str) -> None:
    run = {"model_type": model_type, "block": block(2, 1, tiled_mlp=True), "length": LENGTH}
    assert_parity(pool(2).run(jobs.parity, stage=3, **run))


def test_replicas_whose_shards_have_different_lengths(pool) -> None:
    """One replica's MLPs run in tiles and the other's do not: no collective depends on it."""
    batches = masked([jobs.rows(1, LENGTH)[0], jobs.rows(1, 90)[0]], [0, 40])
    run = {"model_type": "llama", "replicas": 2, "reduction": "token_mean", "checkpointing": True, "stage": 3}
    words = {"tiled_mlp": True, "activation_offload": True}
    assert_parity(pool(4).run(jobs.parity, block=block(1, 2, **words), batches=batches, **run))


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_input_of_every_layer_waits_on_the_host(pool, reentrant: bool) -> None:
    for layers, sent in pool(2).run(jobs.offloaded, block=block(1, 2, activation_offload=True), reentrant=reentrant):
        assert layers <= sent <= layers + 4, "of each layer its input; of the last norm what it saves in fp32"


def test_zero_3_gathers_an_mlp_no_more_often_than_without_tiles(pool) -> None:
    counts = [set(pool(2).run(jobs.gathers, block=block(2, 1, tiled_mlp=on), length=LENGTH)) for on in (False, True)]
    assert max(counts[1]) <= min(counts[0]), counts


def test_offloading_without_checkpointing_is_refused(pool) -> None:
    run = {"model_type": "llama", "block": block(1, 2, activation_offload=True), "stage": 1}
    assert "gradient checkpointing is off" in refused(pool(2), jobs.parity, **run)

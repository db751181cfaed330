"""Gated DeltaNet layers: moving tokens and heads, one layer in fp64, and whole models against HF's own in one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist import delta_layer_jobs, jobs
from tests.dist.test_parity import MESHES, assert_parity, block, masked, packed, padded

DOCUMENTS = [13, 1, 1, 22, 5, 1, 20, 2]


@pytest.mark.parametrize("to", ["row", "ring"])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"u{m[0]}r{m[1]}")
def test_tokens_and_heads_arrive_in_order_and_gradients_go_back(pool, mesh: tuple[int, int], to: str) -> None:
    for error, adjoint in pool(MESHES[mesh]).run(delta_layer_jobs.moved, ulysses=mesh[0], ring=mesh[1], to=to):
        assert error == 0
        assert adjoint <= 1e-12


LAYERS = {
    "fewer key heads": ("heads", (2, 4)),
    "as many key heads": ("heads", (4, 4)),
    "key heads shared by ranks": ("heads", (2, 8)),
    "one key head": ("heads", (1, 4)),
    "state": ("state", (4, 8)),
    "state, more ranks than value heads": ("state", (1, 2)),
}


@pytest.mark.parametrize("lengths", [[61], DOCUMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("mesh", [(1, 2), (2, 2), (1, 4)], ids=lambda m: f"u{m[0]}r{m[1]}")
def test_a_layer_is_the_recurrence_of_the_whole_row(pool, mesh: tuple[int, int], case: str, lengths: list[int]) -> None:
    linear, heads = LAYERS[case]
    run = {"ulysses": mesh[0], "ring": mesh[1], "linear": linear, "heads": heads, "lengths": lengths}
    for errors in pool(MESHES[mesh]).run(delta_layer_jobs.layer_error, **run):
        assert max(errors.values()) <= 1e-10, errors


@pytest.mark.parametrize(
    ("mesh", "linear", "heads", "ranks", "keys"),
    [((2, 2), "heads", (4, 8), 4, 1), ((1, 4), "heads", (2, 8), 4, 1), ((2, 2), "state", (4, 8), 2, 2)],
)
def test_what_a_layer_sends_is_the_formula_of_the_docs(pool, mesh, linear: str, heads, ranks: int, keys: int) -> None:
    """T (2 k P H + V (G + 2)) there and T V G back; in backward the same the other way around."""
    tokens = 64 // (mesh[0] * mesh[1])
    size, value = delta_layer_jobs.KEY, delta_layer_jobs.VALUE
    there = [tokens * (2 * keys * ranks * size + heads[1] * (value + 2)), tokens * heads[1] * value]
    for found in pool(4).run(delta_layer_jobs.traffic, ulysses=mesh[0], ring=mesh[1], linear=linear, heads=heads):
        assert found == {"there": there, "back": there[::-1]}


@pytest.mark.parametrize(("mesh", "kv_heads", "kv_sent"), [((1, 4), 4, 4), ((2, 2), 4, 4), ((2, 2), 1, 2)])
def test_attention_fetches_each_token_and_head_once(pool, mesh: tuple[int, int], kv_heads: int, kv_sent: int) -> None:
    """Where ranks hold consecutive pieces: what Ulysses alone would send, and nothing for the other order."""
    tokens = 64 // (mesh[0] * mesh[1])
    there = [tokens * (8 + 2 * kv_sent) * 16, tokens * 8 * 16]
    for found in pool(4).run(delta_layer_jobs.attention_traffic, ulysses=mesh[0], ring=mesh[1], kv_heads=kv_heads):
        assert sum(found["there"]) == sum(there), found
        assert sum(found["back"]) == sum(there), found


def check(pool, world: int, model_type: str, **run: Any) -> None:
    assert_parity(pool(world).run(jobs.parity, model_type=model_type, **run))


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"u{m[0]}r{m[1]}")
def test_qwen3_5_has_the_gradients_of_one_process(pool, mesh: tuple[int, int]) -> None:
    check(pool, MESHES[mesh], "qwen3_5_text", block=block(*mesh), stage=3)


@pytest.mark.parametrize("linear", ["heads", "state"])
@pytest.mark.parametrize("model_type", ["qwen3_5_moe_text", "qwen3_next", "olmo_hybrid"])
def test_every_listed_model_type_has_parity(pool, model_type: str, linear: str) -> None:
    check(pool, 4, model_type, block=block(2, 2, linear_attention=linear, ring_keep=model_type == "qwen3_next"), stage=3)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_zero_stage(pool, stage: int) -> None:
    check(pool, 4, "qwen3_5_text", block=block(2, 2), stage=stage)


@pytest.mark.parametrize(("linear", "mesh"), [("heads", (1, 4)), ("heads", (2, 2)), ("state", (2, 2)), ("state", (1, 4))])
def test_packed_documents_do_not_see_each_other(pool, linear: str, mesh: tuple[int, int]) -> None:
    run = {"block": block(*mesh, linear_attention=linear), "batches": [packed(DOCUMENTS)]}
    check(pool, 4, "qwen3_5_text", stage=2, **run)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(pool, side: str) -> None:
    check(pool, 2, "qwen3_5_text", block=block(1, 2), stage=1, batches=[padded([40, 9, 23], side)])


def test_accumulation_and_replicas_with_unequal_targets(pool) -> None:
    more = {"replicas": 2, "accumulation": 2, "reduction": "token_mean", "batches": masked(jobs.rows(4, 50), [0, 11, 37, 45])}
    check(pool, 4, "qwen3_5_text", block=block(1, 2), stage=3, **more)


@pytest.mark.parametrize(("linear", "reentrant"), [("heads", True), ("heads", False), ("state", False)])
def test_gradient_checkpointing(pool, linear: str, reentrant: bool) -> None:
    run = {"block": block(1, 2, linear_attention=linear, ring_keep=not reentrant), "checkpointing": reentrant}
    check(pool, 2, "qwen3_5_text", stage=3, **run)


def test_state_passing_beyond_the_value_heads(pool) -> None:
    """Two value heads on four ranks; "auto" passes the state because heads cannot be shared so widely."""
    changes = {"linear_num_value_heads": 2, "linear_num_key_heads": 1}
    check(pool, 4, "qwen3_5_text", block=block(2, 2), stage=3, changes=changes)

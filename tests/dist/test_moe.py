"""Mixtures of experts: gradients of one process, the balance loss of the whole row, and experts that a rank never routes to."""

from __future__ import annotations

from typing import Any

import pytest

from tests.dist import jobs, moe_jobs
from tests.dist.pool import WorkerError
from tests.dist.test_parity import assert_parity, block, masked, packed, padded

MESHES = {(2, 1): 2, (1, 2): 2, (2, 2): 4, (1, 4): 4}
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
SPLIT = {"stage3_param_persistence_threshold": 0}
"""ZeRO-3 otherwise keeps parameters as small as these whole on every rank."""
DOCUMENTS = [13, 1, 1, 22, 5, 1, 20, 2]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"u{m[0]}r{m[1]}")
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_gradients_with_the_balance_loss(pool, model_type: str, mesh: tuple[int, int]) -> None:
    run = {"model_type": model_type, "block": block(*mesh, attention_kernel="auto"), "changes": BALANCED}
    batches = [packed(DOCUMENTS)] if mesh == (2, 2) else None
    assert_parity(pool(MESHES[mesh]).run(jobs.parity, stage=3, batches=batches, **run))


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"u{m[0]}r{m[1]}")
@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_gradients_of_models_without_a_balance_loss(pool, model_type: str, mesh: tuple[int, int]) -> None:
    batches = [packed(DOCUMENTS)] if mesh == (2, 2) else None
    assert_parity(pool(MESHES[mesh]).run(jobs.parity, model_type=model_type, block=block(*mesh), stage=3, batches=batches))


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"u{m[0]}r{m[1]}")
def test_gpt_oss_with_sinks_windows_and_balance_loss_of_whole_and_packed_rows(pool, mesh: tuple[int, int]) -> None:
    """Packed rows against transformers document by document: in one row its eager attention does not tell them apart."""
    run = {"model_type": "gpt_oss", "changes": BALANCED, "batches": [jobs.rows(1, 70)[0], packed(DOCUMENTS)], "accumulation": 2}
    assert_parity(pool(MESHES[mesh]).run(jobs.parity, block=block(*mesh), stage=3, zero=SPLIT, **run))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_gpt_oss_at_every_zero_stage(pool, stage: int) -> None:
    run = {"model_type": "gpt_oss", "changes": BALANCED, "batches": [packed(DOCUMENTS)]}
    assert_parity(pool(4).run(jobs.parity, block=block(2, 2), stage=stage, **run))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_zero_stage(pool, stage: int) -> None:
    assert_parity(pool(4).run(jobs.parity, model_type="qwen3_moe", block=block(2, 2), stage=stage, changes=BALANCED))


@pytest.mark.parametrize("model_type", ["qwen3_5_moe_text", "qwen3_next"])
def test_balance_loss_of_hybrids(pool, model_type: str) -> None:
    assert_parity(pool(4).run(jobs.parity, model_type=model_type, block=block(2, 2), stage=3, changes=BALANCED))


@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum"])
def test_balance_loss_over_replicas_and_accumulation(pool, reduction: str) -> None:
    more = {"replicas": 2, "accumulation": 2, "reduction": reduction, "batches": masked(jobs.rows(4, 50), [0, 11, 37, 45])}
    results = pool(4).run(jobs.parity, model_type="mixtral", block=block(1, 2), stage=2, changes=BALANCED, **more)
    if reduction == "sum":  # what is shown is the micro-batch's own sum
        results = [(loss, 0.0, parameter, error) for loss, _, parameter, error in results]
    assert_parity(results)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(pool, side: str) -> None:
    run = {"block": block(1, 2), "changes": BALANCED, "batches": [padded([40, 9, 23], side)]}
    assert_parity(pool(2).run(jobs.parity, model_type="mixtral", stage=1, **run))


def test_checkpointing_keeps_the_balance_loss_or_refuses(pool) -> None:
    run: dict[str, Any] = {"model_type": "mixtral", "block": block(1, 2), "stage": 3, "changes": BALANCED}
    assert_parity(pool(2).run(jobs.parity, checkpointing=False, **run))
    with pytest.raises(WorkerError) as caught:
        pool(2).run(jobs.parity, checkpointing=True, **run)
    assert "the balance loss would have no gradient" in caught.value.errors[0][1]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"u{m[0]}r{m[1]}")
def test_balance_loss_alone_and_what_it_sends(pool, mesh: tuple[int, int]) -> None:
    """Value and gradient against transformers' own function; 2 E + 1 numbers of 8 bytes for all layers together."""
    for value, gradient, sent in pool(MESHES[mesh]).run(moe_jobs.balance, ulysses=mesh[0], ring=mesh[1], lengths=[13, 1, 22, 14]):
        assert value <= 1e-6
        assert gradient <= 1e-6
        assert sent == [(2 * moe_jobs.EXPERTS + 1) * 8]


@pytest.mark.parametrize("stage", [2, 3])
def test_experts_that_a_rank_never_routes_to(pool, stage: int) -> None:
    """Of 48 experts the 13 tokens of a rank reach at most 13, others on each rank."""
    zero = SPLIT if stage == 3 else None
    run = {"block": block(1, 4), "changes": {**BALANCED, "num_local_experts": 48, "num_experts_per_tok": 1}, "zero": zero}
    assert_parity(pool(4).run(jobs.parity, model_type="mixtral", stage=stage, **run))


def test_a_model_without_a_balance_loss_is_refused_one(pool) -> None:
    with pytest.raises(WorkerError) as caught:
        pool(2).run(jobs.parity, model_type="glm4_moe", block=block(1, 2), stage=0, changes={"output_router_logits": True})
    assert "Glm4MoeForCausalLM has no balance loss in transformers" in caught.value.errors[0][1]


@pytest.mark.parametrize(
    ("world", "mesh", "ep", "stage"),
    [(2, (2, 1), 2, 0), (2, (1, 2), 2, 1), (4, (1, 2), 2, 2), (4, (1, 2), 4, 3), (4, (2, 2), 4, 1), (4, (2, 2), 2, 3)],
    ids=str,
)
def test_experts_spread_by_deepspeeds_autoep(pool, world: int, mesh: tuple[int, int], ep: int, stage: int) -> None:
    """On the ranks that share a row, and over two replicas with rows of their own."""
    for errors, norm, true in pool(world).run(moe_jobs.autoep, stage=stage, ep=ep, block=block(*mesh)):
        assert {name: error for name, error in errors.items() if error > 1e-5} == {}
        assert stage == 0 or norm == pytest.approx(true, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_gradients_are_clipped_by_the_norm_of_all_experts_under_autoep(pool, stage: int) -> None:
    for errors, norm, true in pool(4).run(moe_jobs.autoep, stage=stage, ep=2, block=block(1, 2), clipping=0.3):
        assert norm == pytest.approx(true, rel=1e-5)
        assert {name: error for name, error in errors.items() if error > 1e-5} == {}

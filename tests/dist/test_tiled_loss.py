"""A loss in tiles gives the gradients of whole logits: every parameter against HF's own model in one process, fp32."""

from __future__ import annotations

import pytest

from tests.dist import jobs
from tests.dist.test_api import refused
from tests.dist.test_parity import assert_parity, block, masked

SMOOTHED = {"label_smoothing": 0.1, "z_loss": 1e-2}


@pytest.mark.parametrize(("mesh", "stage"), [((1, 2), 0), ((1, 2), 1), ((1, 2), 2), ((1, 2), 3), ((2, 1), 3)])
def test_gradients_are_those_of_one_process(pool, mesh: tuple[int, int], stage: int) -> None:
    for chunk, tied in [(1, False), (7, True), (100, False)]:
        settings = {"changes": {"tie_word_embeddings": tied}, "checkpointing": tied}
        assert_parity(pool(2).run(jobs.parity, model_type="llama", block=block(*mesh, loss_chunk=chunk), stage=stage, **settings))


@pytest.mark.parametrize(
    ("reduction", "stage"), [("token_mean", 0), ("token_mean", 1), ("token_mean", 2), ("token_mean", 3), ("mean", 3), ("sum", 2)]
)
def test_replicas_accumulation_and_unequal_targets(pool, reduction: str, stage: int) -> None:
    """With a shard and a replica without targets."""
    run = {"model_type": "llama", "stage": stage, "replicas": 2, "accumulation": 2, "reduction": reduction}
    batches = masked(jobs.rows(4, 50), [0, 45, 50, 50])
    results = pool(4).run(jobs.parity, block=block(2, 1, loss_chunk=7), batches=batches, terms=SMOOTHED, **run)
    assert_parity([(loss, 0.0 if reduction == "sum" else error, *rest) for loss, error, *rest in results])


@pytest.mark.parametrize("chunk", [0, 7])
def test_smoothing_and_z_loss_with_whole_logits_and_in_tiles(pool, chunk: int) -> None:
    for terms in ({"label_smoothing": 0.1}, {"z_loss": 1e-2}):
        assert_parity(pool(2).run(jobs.parity, model_type="llama", block=block(1, 2, loss_chunk=chunk), stage=1, terms=terms))


def test_a_model_that_scales_its_logits(pool) -> None:
    changes = {"logits_scaling": 4.0}
    assert_parity(pool(4).run(jobs.parity, model_type="granite", block=block(2, 2, loss_chunk=7), stage=3, changes=changes))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_adapter_on_the_head(pool, stage: int) -> None:
    run = {"model_type": "llama", "block": block(1, 2, loss_chunk=7), "stage": stage, "accumulation": 2}
    assert_parity(pool(2).run(jobs.parity, low_rank=True, **run))


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("low_rank", [False, True])
def test_a_head_that_is_trained_alone(pool, low_rank: bool, stage: int) -> None:
    run = {"model_type": "llama", "stage": stage, "low_rank": low_rank, "head_only": True}
    if low_rank and stage == 3:
        message = refused(pool(2), jobs.parity, block=block(1, 2, loss_chunk=7), **run)
        assert "cannot be the only thing that is trained with a tiled loss" in message
        assert_parity(pool(2).run(jobs.parity, block=block(1, 2, loss_chunk=0), **run))
    else:
        assert_parity(pool(2).run(jobs.parity, block=block(1, 2, loss_chunk=7), **run))


def test_bf16_is_within_twice_the_error_of_bf16_in_one_process(pool) -> None:
    for ours, theirs in pool(2).run(jobs.bf16_errors, block=block(1, 2, loss_chunk=7), stage=3):
        assert ours <= 2 * theirs, (ours, theirs)


def test_zero_3_gathers_the_head_no_more_often_than_without_tiles(pool) -> None:
    counts = [set(pool(2).run(jobs.gathers, block=block(2, 1, loss_chunk=chunk))) for chunk in (0, 1, 7)]
    assert len(set.union(*counts)) == 1, counts


def test_logits_are_none_unless_they_are_asked_for(pool) -> None:
    for kept, error in pool(2).run(jobs.logits_on_request, block=block(1, 2, loss_chunk=7)):
        assert kept is None
        assert error <= 1e-5
    message = refused(pool(2), jobs.unshard_nothing, block=block(1, 2, loss_chunk=7))
    assert "call the engine with return_logits=True" in message


def test_evaluation_and_the_unsharded_model(pool) -> None:
    for error in pool(2).run(jobs.evaluation_error, block=block(1, 2, loss_chunk=7)):
        assert error <= 1e-5
    for equal, generated in pool(2).run(jobs.disabled_outputs, block=block(1, 2, loss_chunk=7)):
        assert equal
        assert generated == 5

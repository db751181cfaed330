"""The raw API: loader, unshard, disabled, evaluation, checkpoints; and what is refused on every rank without a hang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dist import jobs
from tests.dist.pool import WorkerError
from tests.dist.test_parity import block, padded


def test_the_loader_gives_groups_the_same_rows_and_counts_the_whole_step(pool) -> None:
    results = pool(4).run(jobs.loader_rows, block=block(1, 2), accumulation=2, count=13)
    first = [rows for rows, _ in results]
    assert first[0] == first[1]
    assert first[2] == first[3]
    assert set(first[0]) & set(first[2]) <= {-1}
    assert sum(len(set(first[rank]) - {-1}) for rank in (0, 2)) == 13, "every row once"
    assert len(first[0]) == len(first[2]) == 8, "13 rows in steps of 4, the last one filled up"
    for step in range(4):
        counts = {results[rank][1][2 * step + i] for rank in range(4) for i in (0, 1)}
        wanted = sum(jobs.targets_of(row) for rank in (0, 2) for row in first[rank][2 * step : 2 * step + 2] if row >= 0)
        assert counts == {wanted}


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=["u2", "r2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_unshard_gives_whole_rows_in_the_users_order(pool, side: str, mesh: tuple[int, int]) -> None:
    for logits, gradient, local in pool(2).run(jobs.unsharded_logits, block=block(*mesh), batch=padded([40, 9, 23], side)):
        assert logits <= 1e-5
        assert gradient <= 1e-5
        assert local < 3 * 40, "a shard is shorter than the rows"


def test_disabled_runs_the_model_as_transformers_wrote_it(pool) -> None:
    for same, generated in pool(2).run(jobs.disabled_outputs, block=block(2, 1)):
        assert same
        assert generated == 5


def test_evaluation_shows_the_loss_of_one_process(pool) -> None:
    for error in pool(2).run(jobs.evaluation_error, block=block(1, 2)):
        assert error <= 1e-6


def test_a_checkpoint_resumes_with_another_sequence_size(pool, tmp_path: Path) -> None:
    saved = pool(4).run(jobs.train_and_save, block=block(2, 2), folder=str(tmp_path))
    for other in (block(1, 2), block(4, 1)):
        resumed = pool(4).run(jobs.resume, block=other, folder=str(tmp_path))
        for rank, (loss, continued) in enumerate(zip(resumed, saved, strict=True)):
            assert abs(loss - continued) <= 1e-5 * abs(continued), (rank, other, loss, continued)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("backward_divides", [True, False])
def test_the_measured_factor_is_the_assumed_one(pool, stage: int, backward_divides: bool) -> None:
    weights = pool(4).run(jobs.measured_factor, stage=stage, backward_divides=backward_divides)
    assert weights == pytest.approx([1 / 8 if backward_divides else 1 / 4] * 4)


def test_a_factor_that_is_not_the_assumed_one_is_refused(pool) -> None:
    config = {"gradient_allreduce_op": "sum"}
    message = refused(pool(2), jobs.verified_factor, config=config)
    assert "would be" in message
    assert "times too large" in message


BAD_BLOCKS: dict[str, tuple[dict[str, Any], str]] = {
    "size does not divide W": ({"size": 3}, "size: 3 does not divide the 4 ranks"),
    "product": ({"size": 4, "ulysses_size": 2, "ring_size": 4}, "is 8, not size 4"),
    "unknown key": ({"size": 2, "ring_sice": 2}, "unknown key; did you mean 'ring_size'"),
    "kernel of another device": ({"size": 2, "attention_kernel": "torch_flash"}, "'torch_flash' does not run on cpu"),
    "cuDNN on CPU": ({"size": 2, "attention_kernel": "torch_cudnn"}, "'torch_cudnn' does not run on cpu"),
    "later feature": ({"size": 2, "profile": True}, "profile: true is not in this version"),
}


@pytest.mark.parametrize("case", BAD_BLOCKS)
def test_a_bad_block_is_one_sentence_on_every_rank(pool, case: str) -> None:
    bad, reason = BAD_BLOCKS[case]
    assert reason in refused(pool(4), jobs.initialize_only, block=bad)


def test_heads_that_do_not_divide_are_refused_with_the_legal_degrees(pool) -> None:
    message = refused(
        pool(4), jobs.initialize_only, block=block(4, 1), changes={"num_attention_heads": 6, "num_key_value_heads": 6}
    )
    assert "ulysses_size: 4 is not possible for this model: it does not divide the 6 query heads" in message
    assert "legal for size 4: [1, 2]" in message


def test_a_refused_model_is_refused_before_training(pool) -> None:
    message = refused(pool(2), jobs.initialize_only, block=block(2, 1), changes={"attention_dropout": 0.1})
    assert "attention_dropout is 0.1" in message


def test_auto_sizes_stay_inside_a_node(pool) -> None:
    assert pool(4, 2).run(jobs.degrees, block={"size": "auto"}) == [(2, 2, 1)] * 4
    assert pool(4).run(jobs.degrees, block={"size": 4}) == [(4, 1, 1)] * 4
    assert pool(4).run(jobs.degrees, block={"size": 2}) == [(2, 1, 2)] * 4


def test_nodes_of_different_size_count_with_what_divides_them(pool) -> None:
    assert pool(4).run(jobs.local_world_sizes, sizes=[2, 2, 4, 4]) == [2] * 4


def test_rows_that_differ_in_a_group_are_refused_on_every_rank_of_it(pool) -> None:
    assert "the ranks of one sequence group got different rows" in refused(pool(4), jobs.different_rows, block=block(2, 2))


@pytest.mark.parametrize("passes", [1, 2])
def test_one_label_that_differs_later_is_refused_too(pool, passes: int) -> None:
    message = refused(pool(4), jobs.different_rows_later, block=block(2, 2), passes=passes)
    assert "the ranks of one sequence group got different rows (rank 0" in message


BAD_BATCHES = {
    "labels": "labels has shape (1, 17), expected (1, 20)",
    "position_ids": "position_ids has shape (1, 17), expected (1, 20)",
    "attention_mask": "attention_mask has shape (1, 17), expected (1, 20)",
    "something": "something (1, 20) has the row's length 20",
}


@pytest.mark.parametrize("key", BAD_BATCHES)
def test_a_tensor_of_another_length_is_refused(pool, key: str) -> None:
    assert BAD_BATCHES[key] in refused(pool(2), jobs.bad_batch, block=block(1, 2), key=key)


def test_token_mean_without_a_count_is_refused(pool) -> None:
    message = refused(pool(2), jobs.bad_batch, block=block(1, 2, loss_reduction="token_mean"), key="none")
    assert "token_mean needs num_items_in_batch" in message


def test_an_mpu_is_refused(pool) -> None:
    assert "mpu, mesh_param: ds_cp brings its own" in refused(pool(2), jobs.initialize_only, block=block(2, 1), mpu=object)


def refused(workers: Any, function: Any, **kwargs: Any) -> str:
    """The message, after checking that every rank raised the same ValueError."""
    with pytest.raises(WorkerError) as caught:
        workers.run(function, **kwargs)
    errors = caught.value.errors
    assert all(error is not None and error[0] == "ValueError" for error in errors), caught.value
    assert len({error[1] for error in errors}) == 1
    return errors[0][1]

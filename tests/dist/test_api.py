"""The raw API: loader, unshard, disabled, evaluation; what is refused on every rank without a hang; ranks that differ."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import agreement_jobs, jobs
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


@pytest.mark.parametrize(("stage", "labels"), [(1, True), (2, False)])
def test_a_backward_that_deepspeed_gets_wrong_is_refused(pool, stage: int, labels: bool) -> None:
    message = refused(pool(2), jobs.plain_backward, block=block(1, 2), stage=stage, labels=labels)
    assert f"loss.backward(): at ZeRO {stage} with 2 accumulation steps" in message
    pool(2).run(jobs.plain_backward, block=block(1, 2), stage=3)


def test_disabled_runs_the_model_as_transformers_wrote_it(pool) -> None:
    for same, generated in pool(2).run(jobs.disabled_outputs, block=block(2, 1)):
        assert same
        assert generated == 5


def test_evaluation_shows_the_loss_of_one_process(pool) -> None:
    for error in pool(2).run(jobs.evaluation_error, block=block(1, 2)):
        assert error <= 1e-6


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


def test_checkpointing_on_some_ranks_only_is_refused_where_the_ring_goes_by_it(pool) -> None:
    message = refused(pool(2), jobs.checkpointing_on_one_rank, block=block(1, 2))
    assert "gradient checkpointing is on on some ranks of a sequence group" in message


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


HALF = {"attention_kernel": "reference"}

DIFFERENT: dict[str, tuple[dict[int, dict[str, Any]], str]] = {
    "stage": (
        {3: {"stage": 2}},
        r"ds_config\.zero_optimization\.stage is 1 on ranks 0, 1, 2 \(\S+\) and 2 on rank 3 \(\S+\)\. Give every",
    ),
    "accumulation": ({0: {"accumulation": 2}}, r"gradient_accumulation_steps is 2 on rank 0 \(\S+\) and 1 on ranks 1, 2, 3"),
    "switched off": ({2: {"block": {"size": 1}}}, r"sequence_parallel\.size is 4 on ranks 0, 1, 3 .* and 1 on rank 2"),
    "one key more": (
        {1: {"block": {**block(2, 2), **HALF}}},
        r"sequence_parallel\.attention_kernel is not there on ranks 0, 2, 3 .*'reference' on rank 1",
    ),
    "not a block": (
        {1: {"block": {**block(2, 2), "ring_size": 3}}},
        r"ring_size is 2 on ranks 0, 2, 3 .* 3 on rank 1|is 6, not size 4.*\(rank 1\)",
    ),
    "unknown key": ({2: {"block": {**block(2, 2), "layuot": "auto"}}}, r"unknown key; did you mean 'layout'.* \(rank 2\)"),
    "layers": (
        {0: {"changes": {"num_hidden_layers": 1}}},
        r"model\.config\.num_hidden_layers is 1 on rank 0 .* and 2 on ranks 1, 2, 3 .*Build the same",
    ),
    "frequencies": ({1: {"changes": {"rms_norm_eps": 1e-3}}}, r"model\.config\.rms_norm_eps is .* and 0\.001 on rank 1"),
    "a model refused": (
        {1: {"changes": {"attention_dropout": 0.1}}},
        r"model\.config\.attention_dropout is 0\.0 on ranks 0, 2, 3 .* and 0\.1 on rank 1",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_ranks_were_given_is_compared(pool, case: str) -> None:
    own, wanted = DIFFERENT[case]
    message = refused(pool(4), agreement_jobs.initialize, own=own, block=block(2, 2))
    assert re.search(wanted, message), message


def test_a_config_that_one_rank_does_not_find_ends_all(pool) -> None:
    message = refused(pool(2), agreement_jobs.missing_file, block=block(1, 2))
    assert "'not/there.json' is neither a file" in message
    assert message.endswith("(rank 1)")


NO_MODEL: dict[str, tuple[dict[int, str], str]] = {
    "nothing": ({0: "nothing", 1: "nothing"}, r"^model: pass a Hugging Face model, as to deepspeed\.initialize; got None$"),
    "nothing on one rank": ({1: "nothing"}, r"^model: pass a Hugging Face model, .* got None \(rank 1\)$"),
    "a path": ({0: "a path"}, r"; got 'my_model' \(rank 0\)$"),
    "a module of torch": ({1: "a module of torch"}, r"^model: Linear is not a transformers PreTrainedModel, .* \(rank 1\)$"),
    "compiled": ({1: "compiled"}, r"^torch\.compile: the model is compiled, .* \(rank 1\)$"),
}


@pytest.mark.parametrize("case", NO_MODEL)
def test_what_is_no_model_on_any_rank_is_refused_on_all(pool, case: str) -> None:
    own, wanted = NO_MODEL[case]
    assert re.search(wanted, refused(pool(2), agreement_jobs.given, own=own, block=block(1, 2)))


def test_other_packages_are_named(pool) -> None:
    message = refused(pool(4), agreement_jobs.another_version, block=block(2, 2))
    assert re.search(r"transformers is \S+ on ranks 0, 1, 2 \(\S+\) and 0\.0\.1 on rank 3 \(\S+\)\. Install the same", message), (
        message
    )


def test_positions_that_a_model_would_not_count_end_all_replicas(pool) -> None:
    """Else the other one would wait in ZeRO's collectives."""
    own = [torch.arange(20).unsqueeze(0), torch.arange(20).unsqueeze(0) + 5]
    with pytest.raises(WorkerError) as caught:
        pool(4).run(agreement_jobs.positions, of_replicas=own, block=block(1, 2))
    messages = [error[1] if error else "" for error in caught.value.errors]
    assert all("the row of another replica was refused" in text for text in messages[:2]), messages
    assert all("position_ids that do not count from 0" in text for text in messages[2:]), messages


def test_another_plan_of_the_same_row_is_refused_before_the_first_hop(pool) -> None:
    message = refused(pool(2), agreement_jobs.another_plan, block=block(1, 2, layout="balanced"))
    assert re.search(r"have planned the same row differently: chunks to ranks \(rank 0 \w{8}, rank 1 \w{8}\)", message), message


def test_ranks_whose_kernels_differ_are_refused(pool) -> None:
    message = refused(pool(2), agreement_jobs.disagree)
    assert re.search(r"attention_kernel is kernel 0 on rank 0 \(\S+\) and kernel 1 on rank 1 \(\S+\)\. Name one", message), message


@pytest.mark.parametrize("own", [{1: {"max_steps": 5}}, {1: {"block": {"size": 1}}}], ids=str)
def test_the_trainer_compares_its_arguments_too(pool, tmp_path: Path, own: dict[int, dict[str, Any]]) -> None:
    message = refused(pool(2), agreement_jobs.train, folder=str(tmp_path), block=block(1, 2), own=own)
    wanted = (
        r"TrainingArguments\.max_steps is 4 on rank 0 .* and 5 on rank 1|sequence_parallel\.size is 2 on rank 0 .* and 1 on rank 1"
    )
    assert re.search(wanted, message), message


def refused(workers: Any, function: Any, **kwargs: Any) -> str:
    """The message, after checking that every rank raised the same ValueError."""
    with pytest.raises(WorkerError) as caught:
        workers.run(function, **kwargs)
    errors = caught.value.errors
    assert all(error is not None and error[0] == "ValueError" for error in errors), caught.value
    assert len({error[1] for error in errors}) == 1
    return errors[0][1]


def test_an_error_of_one_rank_before_ranks_meet_ends_all(pool) -> None:
    with pytest.raises(WorkerError) as caught:
        pool(2).run(jobs.fails_together)
    assert [error and error[:2] for error in caught.value.errors] == [
        ("ValueError", "ZeroDivisionError: division by zero (rank 1)")
    ] * 2

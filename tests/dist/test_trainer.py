"""ds_cp.Trainer against transformers.Trainer: weights, losses, evaluation, accumulation, saving, resuming, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig

from ds_cp.deal import Passes
from tests.dist import trainer_jobs
from tests.dist.jobs import Rows
from tests.dist.pictures import Pictures, batch_of
from tests.dist.test_api import refused
from tests.dist.test_parity import block


def run(pool: Any, world: int, folder: Path, **kwargs: Any) -> dict[str, Any]:
    results = pool(world).run(trainer_jobs.train, folder=str(folder), **kwargs)
    for result in results[1:]:
        assert losses(result) == losses(results[0]), "every rank logs the same losses"
    return results[0]


def losses(result: dict[str, Any], key: str = "loss") -> list[float]:
    return [entry[key] for entry in result["logs"] if key in entry]


def assert_same_run(got: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-4) -> None:
    assert losses(got) == pytest.approx(losses(wanted), rel=1e-5)
    assert losses(got, "eval_loss") == pytest.approx(losses(wanted, "eval_loss"), rel=1e-5)
    if losses(got, "grad_norm"):  # DeepSpeed reports none at ZeRO 0
        assert losses(got, "grad_norm") == pytest.approx(losses(wanted, "grad_norm"), rel=1e-4)
    for name, weight in wanted["weights"].items():
        # By norm: AdamW turns rounding noise in a gradient of zero into a whole step of that one entry.
        error = float((got["weights"][name] - weight).norm() / weight.norm())
        assert error <= tolerance, f"{name} is off by {error:.1e}"


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=["u2", "r2"])
def test_thirty_steps_are_those_of_one_process(pool, tmp_path: Path, mesh: tuple[int, int]) -> None:
    settings = {"max_steps": 30, "eval_strategy": "steps", "eval_steps": 10}
    wanted = run(pool, 1, tmp_path, block=None, stage=None, **settings)
    assert_same_run(run(pool, 2, tmp_path, block=block(*mesh), **settings), wanted)


@pytest.mark.parametrize("chunk", [0, 7])
def test_label_smoothing_with_whole_logits_and_in_tiles(pool, tmp_path: Path, chunk: int) -> None:
    settings = {"label_smoothing_factor": 0.1, "eval_strategy": "steps", "eval_steps": 4, "metrics": True}
    wanted = run(pool, 1, tmp_path, block=None, stage=None, **settings)
    got = run(pool, 2, tmp_path, block=block(1, 2, loss_chunk=chunk), **settings)
    assert_same_run(got, wanted)
    assert losses(got, "eval_logit_sum") == pytest.approx(losses(wanted, "eval_logit_sum"), rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_without_what_hides_a_scale(pool, tmp_path: Path, stage: int) -> None:
    settings = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    wanted = run(pool, 1, tmp_path, block=None, stage=None, **settings)
    assert_same_run(run(pool, 4, tmp_path, block=block(2, 2), stage=stage, **settings), wanted, tolerance=1e-5)


def test_balance_loss_of_a_mixture_of_experts(pool, tmp_path: Path) -> None:
    """Without accumulation: transformers' Trainer sums the balance loss over micro-batches, ds_cp takes its mean."""
    model = ("qwen3_moe", {"output_router_logits": True, "router_aux_loss_coef": 0.3})
    settings = {"gradient_accumulation_steps": 1, "eval_strategy": "steps", "eval_steps": 4, "model": model}
    settings |= {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    wanted = run(pool, 1, tmp_path, block=None, stage=None, **settings)
    assert_same_run(run(pool, 4, tmp_path, block=block(2, 2), stage=3, **settings), wanted, tolerance=1e-5)


def test_a_vision_language_model_over_two_replicas(pool, tmp_path: Path) -> None:
    """Rows with and without images meet in a step, at which DeepSpeed alone ends with mismatched collectives, so the reference is
    one process that accumulates; evaluation is of padded batches.
    """
    settings = {"model": ("qwen3_vl", {}), "data": Pictures(12), "evaluation": Pictures(8), "trainer": {"data_collator": batch_of}}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    wanted = run(pool, 1, tmp_path, block=None, stage=None, gradient_accumulation_steps=4, **settings)
    assert_same_run(run(pool, 4, tmp_path, block=block(1, 2), stage=3, **settings), wanted, tolerance=1e-5)


def test_auto_in_the_block_is_not_taken_for_an_auto_of_transformers(pool, tmp_path: Path) -> None:
    wanted = run(pool, 1, tmp_path, block=None, stage=None)
    auto = {"size": "auto", "ulysses_size": "auto", "ring_size": 2, "loss_reduction": "auto", "layout": "auto"}
    assert_same_run(run(pool, 4, tmp_path, block=auto), wanted)


@pytest.mark.parametrize("average", [True, False])
def test_two_replicas_are_those_of_transformers(pool, tmp_path: Path, average: bool) -> None:
    settings = {"average_tokens_across_devices": average, "eval_strategy": "steps", "eval_steps": 2}
    wanted = run(pool, 2, tmp_path, block=None, stage=1, **settings)
    assert_same_run(run(pool, 4, tmp_path, block=block(1, 2), stage=1, **settings), wanted)


def test_sum_and_mean_are_what_they_say(pool, tmp_path: Path) -> None:
    """One micro-batch a step and no clipping: sum is the mean times the row's targets."""
    settings = {"gradient_accumulation_steps": 1, "max_steps": 1, "max_grad_norm": 0.0, "data": Rows(1)}
    mean = run(pool, 2, tmp_path, block=block(2, 1, loss_reduction="mean"), **settings)
    total = run(pool, 2, tmp_path, block=block(2, 1, loss_reduction="sum"), **settings)
    assert losses(total)[0] == pytest.approx(losses(mean)[0] * 23, rel=1e-5)
    assert losses(total, "grad_norm")[0] == pytest.approx(losses(mean, "grad_norm")[0] * 23, rel=1e-4)


def test_steps_epochs_and_tokens_count_rows_once(pool, tmp_path: Path) -> None:
    settings = {"max_steps": -1, "num_train_epochs": 1.0, "include_num_input_tokens_seen": "all"}
    result = run(pool, 4, tmp_path, block=block(1, 2), **settings)
    training = [entry for entry in result["logs"] if "loss" in entry]
    assert len(training) == 16 // (2 * 2), "16 rows, 2 replicas, accumulation 2"
    assert training[-1]["num_input_tokens_seen"] == 16 * 24
    assert all(entry["tokens_per_second"] > 0 for entry in training)


def test_metrics_see_the_whole_rows(pool, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 4, "metrics": True}
    wanted = run(pool, 1, tmp_path, block=None, stage=None, **settings)
    got = run(pool, 4, tmp_path, block=block(2, 2), **settings)
    for key in ("eval_rows", "eval_tokens", "eval_right"):
        assert losses(got, key) == losses(wanted, key)
    assert losses(got, "eval_logit_sum") == pytest.approx(losses(wanted, "eval_logit_sum"), rel=1e-5)


def test_evaluation_with_replicas_and_an_uneven_last_batch(pool, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 4, "metrics": True}
    got = run(pool, 4, tmp_path, block=block(1, 2), **settings)
    assert losses(got, "eval_rows") == [5], "five rows over two replicas, none twice"


def test_rows_that_a_collator_has_joined_count_as_rows_in_an_evaluation(pool, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2, "trainer": {"data_collator": trainer_jobs.flattened}}
    wanted = run(pool, 1, tmp_path, block=None, stage=None, **settings)
    assert_same_run(run(pool, 2, tmp_path, block=block(1, 2), **settings), wanted)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_trainer_goes_on_with_another_size_and_layout(pool, tmp_path: Path, stage: int) -> None:
    whole = run(pool, 4, tmp_path, block=block(2, 2), stage=stage, save_strategy="steps", save_steps=2)
    other = {"block": block(1, 2, layout="contiguous"), "gradient_accumulation_steps": 1}
    resumed = run(pool, 4, tmp_path, stage=stage, resume=str(tmp_path / "checkpoint-2"), **other)
    assert len(losses(whole)) == 4
    assert_same_run(resumed, whole)


ORDERS: dict[str, dict[str, Any]] = {
    "map": {"data": Rows(13), "dataloader_num_workers": 2},
    "stream": {"data": trainer_jobs.Stream(13), "dataloader_num_workers": 1},
}


@pytest.mark.parametrize("kind", ORDERS)
def test_a_run_that_stops_in_its_second_epoch_goes_on_with_the_same_rows(pool, tmp_path: Path, kind: str) -> None:
    """13 rows in steps of 4: step 6 is in the middle of the second epoch, which has another order."""
    settings = {"block": block(1, 2), "max_steps": 9, **ORDERS[kind]}
    whole = run(pool, 4, tmp_path, save_strategy="steps", save_steps=6, **settings)
    resumed = run(pool, 4, tmp_path, resume=str(tmp_path / "checkpoint-6"), **settings)
    assert len(losses(whole)) == 9
    assert losses(resumed) == losses(whole)
    assert len(set(losses(whole))) == 9
    for name, weight in (whole["weights"] or {}).items():
        assert torch.equal(resumed["weights"][name], weight)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_read_pass_after_pass_by_every_rank_of_a_group(pool, tmp_path: Path, workers: int) -> None:
    """Accumulation 2 over 5 rows: a step that begins in one pass ends in the next, as if the stream had no end."""
    settings = {"max_steps": 4, "dataloader_num_workers": workers}
    wanted = run(pool, 1, tmp_path, block=None, stage=None, data=Passes(trainer_jobs.Stream(5)), **settings)
    got = run(pool, 2, tmp_path, block=block(1, 2), data=trainer_jobs.Stream(5), **settings)
    assert_same_run(got, wanted)


def test_a_stream_to_evaluate_on(pool, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 4, "metrics": True, "evaluation": trainer_jobs.Stream(5)}
    wanted = run(pool, 1, tmp_path, block=None, stage=None, **settings)
    got = run(pool, 2, tmp_path, block=block(2, 1), **settings)
    assert losses(got, "eval_rows") == [5]
    assert losses(got, "eval_loss") == pytest.approx(losses(wanted, "eval_loss"), rel=1e-5)


def test_streams_that_would_give_rows_twice_are_refused(pool, tmp_path: Path) -> None:
    run = {"folder": str(tmp_path), "block": block(1, 2)}
    message = refused(pool(2), trainer_jobs.train, data=trainer_jobs.Stream(5), dataloader_num_workers=2, **run)
    assert "dataloader_num_workers: got 2 for an IterableDataset, allowed 0 and 1" in message
    evaluation = {"evaluation": trainer_jobs.Stream(5), "eval_strategy": "steps", "eval_steps": 40}  # before it comes to that
    assert "eval_dataset: an IterableDataset over 2 replicas" in refused(pool(4), trainer_jobs.train, **evaluation, **run)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "custom loss": ({"trainer": {"compute_loss_func": trainer_jobs.custom_loss}}, "compute_loss_func: not in this version"),
    "ALST": ({"parallelism_config": ParallelismConfig(sp_size=2, sp_backend="deepspeed")}, "parallelism_config: not in this"),
    "split batches": ({"accelerator_config": {"split_batches": True}}, "the ranks of a sequence group need the same row"),
    "accelerate launch --dynamo_backend": ({"environment": {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}}, "dynamo_backend: not in this"),
    "NEFTune": ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: not in this version"),
    "any order": ({"dataloader_in_order": False, "dataloader_num_workers": 2}, "dataloader_in_order: not in this version"),
    "balanced batches": ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy: batch_rebalance: not in this"),
    "Seq2SeqTrainer's": ({"predict_with_generate": True}, "predict_with_generate: not in this version"),
    "objects of an evaluation": ({"eval_use_gather_object": True}, "eval_use_gather_object: not in this version"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_argument_that_would_change_its_meaning_is_refused(pool, tmp_path: Path, case: str) -> None:
    arguments, reason = REFUSED[case]
    message = refused(pool(2), trainer_jobs.train, folder=str(tmp_path), block=block(2, 1), **arguments)
    assert reason in message


def test_replicas_with_different_numbers_of_batches_are_refused(pool, tmp_path: Path) -> None:
    uneven = {"accelerator_config": {"even_batches": False}}
    message = refused(pool(4), trainer_jobs.train, folder=str(tmp_path), block=block(1, 2), **uneven)
    assert "even_batches: False lets 2 replicas have different numbers of batches" in message


def test_rows_drawn_by_workers_are_the_same_in_a_sequence_group(pool, tmp_path: Path) -> None:
    """transformers seeds the workers of every rank otherwise; here of every replica."""
    settings = {"data": trainer_jobs.Drawn(16), "dataloader_num_workers": 2, "max_steps": 3}
    assert len(losses(run(pool, 4, tmp_path, block=block(1, 2), **settings))) == 3


def test_more_ranks_than_have_saved_their_random_numbers_draw_alike(pool, tmp_path: Path) -> None:
    """The second epoch begins with what was restored: ranks 2 and 3 find nothing."""
    settings = {"data": trainer_jobs.Drawn(4), "dataloader_num_workers": 1, "stage": 0}
    run(pool, 2, tmp_path, block=block(1, 2), max_steps=2, save_strategy="steps", save_steps=2, **settings)
    resumed = run(pool, 4, tmp_path, block=block(1, 4), resume=str(tmp_path / "checkpoint-2"), **settings)
    assert len(losses(resumed)) == 4


def test_loaders_of_the_users_own_are_shared_out_too(pool, tmp_path: Path) -> None:
    settings = {"block": block(1, 2), "max_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    assert_same_run(run(pool, 4, tmp_path, kind=trainer_jobs.OwnLoaders, **settings), run(pool, 4, tmp_path, **settings))


def test_a_trainer_without_deepspeed_is_refused(pool, tmp_path: Path) -> None:
    message = refused(pool(2), trainer_jobs.train, folder=str(tmp_path), block=block(2, 1), stage=None)
    assert "DeepSpeed is not active" in message

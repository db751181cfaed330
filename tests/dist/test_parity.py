"""Loss and every parameter's applied gradient against HF's own model in one process, fp32, SGD, no clipping."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_cp.batch import IGNORE
from tests.dist import jobs
from tests.dist.pool import WorkerError

TOLERANCE = 1e-5
MESHES = {(2, 1): 2, (1, 2): 2, (4, 1): 4, (1, 4): 4, (2, 2): 4}


def block(ulysses: int, ring: int, **more: Any) -> dict[str, Any]:
    return {"size": ulysses * ring, "ulysses_size": ulysses, "ring_size": ring, **more}


def assert_parity(results: list[tuple[float, float, str, float]], tolerance: float = TOLERANCE) -> None:
    for rank, (loss, loss_error, parameter, error) in enumerate(results):
        assert loss_error <= tolerance, f"rank {rank}: loss {loss} is off by {loss_error:.2e}"
        assert error <= tolerance, f"rank {rank}: gradient of {parameter} is off by {error:.2e}"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"u{m[0]}r{m[1]}")
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen2", "gpt_neox"])
def test_gradients_are_those_of_one_process(pool, model_type: str, mesh: tuple[int, int], stage: int) -> None:
    assert_parity(pool(MESHES[mesh]).run(jobs.parity, model_type=model_type, block=block(*mesh), stage=stage))


@pytest.mark.parametrize("model_type", ["gemma", "olmo", "olmo2", "granite", "smollm3", "seed_oss", "starcoder2"])
def test_every_listed_model_type_has_parity(pool, model_type: str) -> None:
    assert_parity(pool(4).run(jobs.parity, model_type=model_type, block=block(2, 2), stage=3))


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (2, 2), (1, 4)], ids=lambda m: f"u{m[0]}r{m[1]}")
@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "cohere2", "phi3", "olmo3"])
def test_sliding_windows_of_whole_and_packed_rows(pool, model_type: str, mesh: tuple[int, int]) -> None:
    batches = [jobs.rows(1, 70)[0], packed([13, 1, 1, 22, 5, 1, 20, 2])]
    run = {"model_type": model_type, "block": block(*mesh), "batches": batches, "accumulation": 2}
    assert_parity(pool(MESHES[mesh]).run(jobs.parity, stage=2, **run))


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (2, 2), (1, 4)], ids=lambda m: f"u{m[0]}r{m[1]}")
def test_softcap_and_windows_of_gemma2(pool, mesh: tuple[int, int]) -> None:
    batches = [jobs.rows(1, 70)[0], packed([13, 1, 1, 22, 5, 1, 20, 2])]
    run = {"model_type": "gemma2", "block": block(*mesh), "batches": batches, "accumulation": 2}
    assert_parity(pool(MESHES[mesh]).run(jobs.parity, stage=2, **run))


def test_a_kernel_without_softcap_is_refused_with_the_name_of_one_that_has_it(pool) -> None:
    with pytest.raises(WorkerError) as caught:
        pool(2).run(jobs.parity, model_type="gemma2", block=block(1, 2, attention_kernel="torch_cpu"), stage=0)
    assert "attention_kernel: torch_cpu: it has no softcap; use reference" in caught.value.errors[0][1]


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (2, 2), (1, 4)], ids=lambda m: f"u{m[0]}r{m[1]}")
def test_attention_sinks_and_their_gradient(pool, mesh: tuple[int, int], window: int | None) -> None:
    for error in pool(MESHES[mesh]).run(jobs.sink_error, ulysses=mesh[0], ring=mesh[1], window=window):
        assert error <= 1e-10


@pytest.mark.parametrize("window", [2, 8, 17, 40, 69, 70, 1000])
def test_any_window(pool, window: int) -> None:
    """Over several chunks, as long as the row, longer. With a window of one token the true gradient of q and k is zero, and both
    sides have only rounding there: `tests/unit/test_ring.py` has that one in fp64.
    """
    run = {"model_type": "mistral", "block": block(1, 4), "changes": {"sliding_window": window}, "length": 70}
    assert_parity(pool(4).run(jobs.parity, stage=1, **run))


def test_windows_of_some_layers(pool) -> None:
    changes = {"sliding_window": 9, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}
    run = {"block": block(1, 4, ring_impl="allgather"), "changes": changes, "batches": [packed([13, 1, 22, 14])]}
    assert_parity(pool(4).run(jobs.parity, model_type="qwen2", stage=1, **run))


FLAGS = {
    "no_reduce_scatter": {"reduce_scatter": False},
    "not_contiguous": {"contiguous_gradients": False},
    "overlap": {"overlap_comm": True},
    "cpu_optimizer": {"offload_optimizer": {"device": "cpu"}},
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_flags_do_not_change_the_gradient(pool, stage: int, flags: str, accumulation: int) -> None:
    results = pool(2).run(
        jobs.parity, model_type="llama", block=block(1, 2), stage=stage, zero=FLAGS[flags], accumulation=accumulation
    )
    assert_parity(results)


def test_parameter_offload_does_not_change_the_gradient(pool) -> None:
    zero = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    assert_parity(pool(2).run(jobs.parity, model_type="llama", block=block(2, 1), stage=3, zero=zero, accumulation=2))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("reduction", ["mean", "token_mean", "sum"])
def test_reductions_over_replicas_and_accumulation(pool, reduction: str, stage: int) -> None:
    batches = masked(jobs.rows(4, 50), [0, 11, 37, 45])
    results = pool(4).run(
        jobs.parity,
        model_type="llama",
        block=block(1, 2),
        stage=stage,
        batches=batches,
        replicas=2,
        accumulation=2,
        reduction=reduction,
    )
    if reduction == "sum":  # what is shown is the micro-batch's own sum, so only the gradient has one right value
        results = [(loss, 0.0, parameter, error) for loss, _, parameter, error in results]
    assert_parity(results)


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"u{m[0]}r{m[1]}")
def test_packed_documents_do_not_see_each_other(pool, mesh: tuple[int, int]) -> None:
    batches = [packed([13, 1, 1, 22, 5, 1, 20, 2])]
    assert_parity(pool(MESHES[mesh]).run(jobs.parity, model_type="llama", block=block(*mesh), stage=2, batches=batches))


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=["u2r1", "r2"])
def test_documents_that_the_cpu_kernel_computes_in_parts(pool, mesh: tuple[int, int]) -> None:
    batches = [packed([1500, 7, 1300])]
    assert_parity(pool(2).run(jobs.parity, model_type="llama", block=block(*mesh), stage=3, batches=batches))


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=["u2r1", "r2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(pool, side: str, mesh: tuple[int, int]) -> None:
    batches = [padded([40, 9, 23], side)]
    assert_parity(pool(2).run(jobs.parity, model_type="llama", block=block(*mesh), stage=1, batches=batches))


def test_a_shard_without_targets(pool) -> None:
    batches = masked(jobs.rows(1, 64), [60])
    assert_parity(pool(4).run(jobs.parity, model_type="llama", block=block(4, 1), stage=1, batches=batches))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_replica_without_targets(pool, stage: int) -> None:
    batches = masked(jobs.rows(2, 48), [0, 48])
    run = {"model_type": "llama", "block": block(2, 1), "stage": stage, "batches": batches, "replicas": 2}
    assert_parity(pool(4).run(jobs.parity, **run, reduction="token_mean"))
    assert_parity(pool(4).run(jobs.parity, **run, reduction="mean"))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("stage", [1, 3])
def test_gradient_checkpointing(pool, stage: int, reentrant: bool) -> None:
    assert_parity(
        pool(4).run(jobs.parity, model_type="qwen3", block=block(2, 2, ring_keep=True), stage=stage, checkpointing=reentrant)
    )


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_fewer_kv_heads_than_ulysses_ranks(pool, kv_heads: int) -> None:
    changes = {"num_key_value_heads": kv_heads}
    assert_parity(pool(4).run(jobs.parity, model_type="llama", block=block(4, 1), stage=3, changes=changes))


@pytest.mark.parametrize("documents", [[65], [13, 1, 1, 22, 5, 1, 20, 2]], ids=["whole", "packed"])
@pytest.mark.parametrize("mesh", [(1, 2), (1, 4), (2, 2)], ids=lambda m: f"u{m[0]}r{m[1]}")
def test_gathering_instead_of_hops(pool, mesh: tuple[int, int], documents: list[int]) -> None:
    run = {"model_type": "llama", "block": block(*mesh, ring_impl="allgather"), "batches": [packed(documents)]}
    assert_parity(pool(MESHES[mesh]).run(jobs.parity, stage=3, **run))


@pytest.mark.parametrize("ring_impl", ["p2p", "allgather"])
@pytest.mark.parametrize("mesh", [(1, 2), (2, 2), (1, 4)], ids=lambda m: f"u{m[0]}r{m[1]}")
def test_balanced_layout_of_packed_rows(pool, mesh: tuple[int, int], ring_impl: str) -> None:
    batches = [packed([430, 13, 1, 22, 900, 5, 300])]
    run = {"model_type": "qwen3", "block": block(*mesh, layout="balanced", ring_impl=ring_impl, ring_keep=True), "batches": batches}
    assert_parity(pool(MESHES[mesh]).run(jobs.parity, stage=2, changes={"max_position_embeddings": 2048}, **run))


def test_contiguous_layout(pool) -> None:
    assert_parity(pool(4).run(jobs.parity, model_type="llama", block=block(1, 4, layout="contiguous"), stage=1))


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_a_row_shorter_than_the_ranks(pool, length: int) -> None:
    batches = jobs.rows(1, max(length, 2))
    assert_parity(pool(4).run(jobs.parity, model_type="llama", block=block(2, 2), stage=1, batches=batches))


def test_bf16_is_within_twice_the_error_of_bf16_in_one_process(pool) -> None:
    for ours, theirs in pool(2).run(jobs.bf16_errors, block=block(1, 2), stage=2):
        assert ours <= 2 * theirs, (ours, theirs)


def test_fp64_without_deepspeed(pool) -> None:
    for mesh, ring_impl in [*((mesh, "p2p") for mesh in MESHES), ((1, 4), "allgather"), ((2, 2), "allgather")]:
        for results in pool(MESHES[mesh]).run(jobs.fp64_parity, ulysses=mesh[0], ring=mesh[1], ring_impl=ring_impl):
            for kernel, error in results.items():
                assert error <= 1e-10, (mesh, ring_impl, kernel, error)


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=["u2", "r2"])
def test_thirty_steps_of_adam_give_the_weights_of_one_process(pool, mesh: tuple[int, int]) -> None:
    for error in pool(2).run(jobs.thirty_steps, block=block(*mesh), stage=1):
        assert error <= 1e-4, error


def masked(batches: list[dict[str, Any]], first: list[int]) -> list[dict[str, Any]]:
    """Rows whose labels begin at different places, so that every micro-batch has another number of targets."""
    for batch, start in zip(batches, first, strict=True):
        batch["labels"][:, :start] = IGNORE
    return batches


def packed(lengths: list[int]) -> dict[str, Any]:
    batch = jobs.rows(1, sum(lengths))[0]
    batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    batch["labels"] = batch["labels"].masked_fill(batch["position_ids"] == 0, IGNORE)
    return batch


def padded(lengths: list[int], side: str) -> dict[str, Any]:
    """Rows of different length; the first real label of a row is masked, because HF would predict it from left padding."""
    longest = max(lengths)
    ids = torch.cat([row["input_ids"] for row in jobs.rows(len(lengths), longest)])
    column = torch.arange(longest).expand(len(lengths), -1)
    count = torch.tensor(lengths).unsqueeze(1)
    mask = column < count if side == "right" else column >= longest - count
    first = column == (0 if side == "right" else longest - count)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask | first, IGNORE)}

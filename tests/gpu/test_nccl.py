"""Two ranks on two GPUs over NCCL: every gradient against one process, kernels in bf16, what ranks disagree about, faults.

python -m pytest tests/gpu/test_nccl.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import jobs
from tests.dist.pool import Pool, WorkerError
from tests.dist.test_parity import assert_parity, packed
from tests.faults import test_faults
from tests.gpu import nccl_jobs
from tests.warm import ROOT

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
MESHES = {"ulysses": (2, 1), "ring": (1, 2)}
DOCUMENTS = [13, 1, 1, 22, 5, 1, 20, 2]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Any]:
    """Runs a job on two ranks, new ones after a failure: NCCL does not survive a collective that some ranks left."""
    started: list[Pool] = []

    def run(function: Any, **kwargs: Any) -> list[Any]:
        if not started or not started[-1].usable:
            started.append(Pool(2, device="cuda"))
        try:
            return started[-1].run(function, **kwargs)
        except WorkerError:
            started[-1].close()
            raise

    yield run
    for each in started:
        each.close()


def block(mesh: str, **more: Any) -> dict[str, Any]:
    ulysses, ring = MESHES[mesh]
    return {"size": 2, "ulysses_size": ulysses, "ring_size": ring, "attention_kernel": "reference", **more}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("documents", [[70], DOCUMENTS], ids=["whole", "packed"])
def test_gradients_are_those_of_one_process(ranks, documents: list[int], mesh: str, stage: int) -> None:
    run = {"model_type": "qwen3", "block": block(mesh), "stage": stage, "accumulation": 2}
    assert_parity(ranks(jobs.parity, batches=[packed(documents), packed([70])], **run))


@pytest.mark.parametrize("more", [{"ring_impl": "allgather"}, {"layout": "balanced"}, {"layout": "contiguous"}], ids=str)
def test_layouts_and_ways_of_the_ring(ranks, more: dict[str, Any]) -> None:
    batches = [packed([430, 13, 1, 22, 900, 5, 300])]
    run = {"model_type": "llama", "block": block("ring", **more), "changes": {"max_position_embeddings": 2048}}
    assert_parity(ranks(jobs.parity, stage=3, batches=batches, **run))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma2", "olmoe", "gpt_oss", "qwen3_5_text"])
def test_windows_softcap_experts_sinks_and_delta_layers(ranks, model_type: str, mesh: str) -> None:
    more = {"delta_kernel": "reference"} if model_type.startswith("qwen3_5") else {}
    run = {"model_type": model_type, "block": block(mesh, **more), "batches": [jobs.rows(1, 70)[0], packed(DOCUMENTS)]}
    assert_parity(ranks(jobs.parity, stage=3, accumulation=2, **run))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("more", [{"loss_chunk": 16}, {"tiled_mlp": True}, {"activation_offload": True}], ids=str)
def test_tiles_and_offload(ranks, more: dict[str, Any], mesh: str) -> None:
    run = {"model_type": "llama", "block": block(mesh, **more), "checkpointing": False}
    assert_parity(ranks(jobs.parity, stage=3, length=500, changes={"max_position_embeddings": 512}, **run))


@pytest.mark.parametrize("more", [{}, {"ring_impl": "allgather"}, {"layout": "balanced"}], ids=str)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("kernel", ["auto", "torch_flash", "torch_cudnn", "flash_attn"])
def test_bf16_is_within_twice_the_error_of_one_process(ranks, kernel: str, mesh: str, more: dict[str, Any]) -> None:
    if kernel != "auto" and (reason := nccl_jobs.installed(kernel)):
        pytest.skip(reason)
    batches = [packed([2600, 1, 700, 795])]
    run = {"block": block(mesh, **more) | {"attention_kernel": kernel}, "stage": 2, "batches": batches}
    for ours, theirs in ranks(nccl_jobs.bf16_errors, **run):
        assert ours <= 2 * theirs, (ours, theirs)


@pytest.mark.parametrize("mesh", MESHES)
def test_twenty_steps_are_the_same_with_every_saving_of_memory(ranks, mesh: str) -> None:
    plain = block(mesh, attention_kernel="auto")
    savings = {"loss_chunk": 512, "tiled_mlp": True, "activation_offload": True}
    losses = [ranks(nccl_jobs.adamw_losses, block=plain | more, steps=20)[0] for more in ({}, savings)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)  # bf16 weights: a rounding differs, and AdamW amplifies it
    assert losses[0][-1] < losses[0][0] - 0.2


def test_fp32_is_refused_before_training_where_the_kernel_has_none(ranks) -> None:
    with pytest.raises(WorkerError) as caught:
        ranks(jobs.initialize_only, block=block("ring", attention_kernel="torch_flash"))
    wanted = "torch_flash: it computes in fp16 and bf16, got torch.float32; enable bf16 in the config or use reference"
    assert all(error is not None and wanted in error[1] for error in caught.value.errors)


@pytest.mark.parametrize("passes", [0, 1, 4])
def test_rows_that_differ_are_refused_on_both_ranks(ranks, passes: int) -> None:
    """One label of one rank, in the first pass and in later ones, which are read without waiting for the device."""
    with pytest.raises(WorkerError) as caught:
        ranks(nccl_jobs.label_differs, block=block("ring"), passes=passes)
    for error in caught.value.errors:
        assert error is not None
        assert "different rows" in error[1]


def test_a_nan_on_one_rank_is_raised_on_both(ranks) -> None:
    with pytest.raises(WorkerError) as caught:
        ranks(nccl_jobs.nan_loss, block=block("ring"))
    for error in caught.value.errors:
        assert error is not None
        assert re.search(r"nan.* ranks \[1\]", error[1]), error[1]


FAULTS = {
    "kill-forward": r"ds_cp: rank 0 on \S+ (stopped|waited) in step 4, ",
    "kill-backward": r"ds_cp: rank 0 on \S+ (stopped|waited) in step 4, ",
    "stop": r"ds_cp: rank 0 on \S+ (stopped|waited) in step 4, ",
    "stall": r"ds_cp: rank 0 on \S+ waited in step 4, .*not done in time; .*fewer .* rank 1 on ",
    "full-disk": r"ds_cp: rank 0 on \S+ (stopped|waited) in step 4, save.*: rank 1 on \S+ stopped in step 4, save",
}


class Cold:
    """Starts a rank as `tests.warm.Warm` does, but not from a fork, which CUDA does not survive."""

    def start(self, program: str, *arguments: object, log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", program, *map(str, arguments)]
        with open(log, "w") as file:
            variables = {**os.environ, **environment, "DS_ACCELERATOR": "cuda"}
            return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT)


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_ends_the_other_rank_with_a_line(what: str, tmp_path: Path) -> None:
    ended = test_faults.run(Cold(), tmp_path / "run", what)
    assert ended.codes[0] not in (0, None), ended.texts[0][-3000:]
    assert re.search(FAULTS[what], ended.texts[0]), ended.texts[0][-3000:]
    assert ended.seconds < test_faults.BOUND_S

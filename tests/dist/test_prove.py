"""`ds-cp selftest` on real ranks: what it says, and that a wrong gradient is no PASS."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ds_cp.cli import app
from ds_cp.prove import with_precision
from tests.dist import prove_jobs
from tests.dist.pool import WorkerError


@pytest.mark.parametrize("ulysses", [1, 2])
def test_everything_is_proved_and_measured(pool, ulysses: int) -> None:
    for said in pool(2).run(prove_jobs.proved, block={"size": 2, "ulysses_size": ulysses}, stage=3):
        assert "equal to the reference" in said["attention kernel"]
        assert "worst gradient" in said["a tiny twin against one process"]
        axis = "all-to-all over ulysses" if ulysses == 2 else "hop of the ring"
        assert float(said[f"{axis}, slowest rank"].removesuffix(" GB/s")) > 0
        assert any(what.startswith("attention kernel, ") and float(found.split()[0]) > 0 for what, found in said.items())


def test_a_wrong_gradient_is_a_sentence_on_every_rank(pool) -> None:
    with pytest.raises(WorkerError) as caught:
        pool(2).run(prove_jobs.proved, block={"size": 2}, stage=1, gradients_times=2.0)
    assert all("do not train" in error[1] for error in caught.value.errors)


def test_a_model_that_is_refused_is_a_sentence_too(pool) -> None:
    with pytest.raises(WorkerError) as caught:
        pool(2).run(prove_jobs.proved, block={"size": 2}, stage=1, model_type="falcon")
    assert all("0 modules mix tokens" in error[1] for error in caught.value.errors)


@pytest.mark.parametrize("package", ["ds_cp", "torch"])
def test_another_version_on_one_host_is_a_sentence_on_every_rank(pool, package: str) -> None:
    """Before anything that the versions may do differently, so no rank waits for another."""
    wanted = rf"^refused: the ranks of this job differ: {package} is .* on rank 0 .* and 0\.0\.1.* on rank 1 .*\. Install the same"
    for code, said in pool(2).run(prove_jobs.in_the_shell, block={"size": 2}, another=package):
        assert code == 1
        assert re.search(wanted, said), said


@pytest.mark.parametrize("on_cuda", [True, False])
def test_auto_of_a_precision_is_tried_as_the_trainer_would_fill_it_in(on_cuda: bool) -> None:
    written = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "initial_scale_power": 8}, "sequence_parallel": {"size": 2}}
    tried = with_precision(written, on_cuda)
    assert tried == written | {"bf16": {"enabled": on_cuda}, "fp16": {"enabled": False, "initial_scale_power": 8}}
    assert with_precision(tried, not on_cuda) == tried


def test_without_a_launcher_it_says_how_to_start(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"sequence_parallel": {"size": 2}}')
    result = CliRunner().invoke(app, ["selftest", str(tmp_path / "c.json"), "--model", str(tmp_path)])
    assert result.exit_code == 1
    assert "start it on the ranks of the job" in " ".join(result.output.split())

"""What the workers run for `ds-cp selftest`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

from ds_cp import cli, prove, selftest
from tests.dist import agreement_jobs


def proved(block: dict[str, Any], stage: int, model_type: str = "stablelm", gradients_times: float = 1.0) -> dict[str, str]:
    """What `prove` says; with another factor its gradients are made wrong on the way."""
    sharded = selftest.sharded

    def scaled(*args: Any, **kwargs: Any) -> Any:
        loss, gradients = sharded(*args, **kwargs)
        return loss, {name: gradients_times * gradient for name, gradient in gradients.items()}

    said: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        CONFIG_MAPPING[model_type](num_attention_heads=32, num_hidden_layers=2).save_pretrained(folder)
        path = Path(folder) / "ds_config.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}, "sequence_parallel": block}))
        selftest.sharded = scaled
        try:
            prove.prove(str(path), folder, said.__setitem__)
        finally:
            selftest.sharded = sharded
    return said


def in_the_shell(block: dict[str, Any], another: str) -> tuple[int, str]:
    """Exit code and output of `ds-cp selftest` on this rank; the last one's host has another version of a package."""
    with tempfile.TemporaryDirectory() as folder, agreement_jobs.other(another):
        path = Path(folder) / "ds_config.json"
        path.write_text(json.dumps({"sequence_parallel": block}))
        done = CliRunner().invoke(cli.app, ["selftest", str(path), "--model", folder])
    return done.exit_code, " ".join(done.output.split())

"""A lock that a dead build left is named and refused; a running build is waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LilyConfig, LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from torch import nn

from ds_cp import preflight, selftest


def lock(root: Path, age_s: float) -> Path:
    folder = root / "some_op"
    folder.mkdir()
    path = folder / "lock"
    path.touch()
    then = time.time() - age_s
    for each in (path, folder):
        os.utime(each, (then, then))
    return path


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"expert_parallel": {"enabled": True, "autoep_size": 2}}, "is in this version for deepseek_v3, not for mixtral: "),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size: 2 is not in this version"),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine.enabled: true beside sequence_parallel"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency: enabled beside sequence_parallel"),
        ({"data_efficiency": {"data_routing": {"random_ltd": {"enabled": True}}}}, "dropping tokens"),
    ],
)
def test_other_ways_to_split_layers_are_refused(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        preflight.refuse_sections(section, "mixtral")


def test_other_ways_to_split_layers_may_be_off() -> None:
    preflight.refuse_sections({"expert_parallel": {"enabled": False}, "tensor_parallel": {"autotp_size": 1}}, "mixtral")
    preflight.refuse_sections({"expert_parallel": {"enabled": True}}, "deepseek_v3")
    preflight.refuse_sections({"hybrid_engine": {"enabled": False}, "data_efficiency": {"enabled": False, "data_routing": {}}}, "")


ADAPTERS: dict[str, tuple[PeftConfig, str]] = {
    "activated": (LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5]), r"\(LORA\) cannot .* from a place of the row"),
    "Lily": (LilyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), r"\(LILY\) cannot .* mean over all tokens"),
    "prefixes": (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), r"\(PREFIX_TUNING\) cannot .* as a cache"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_that_act_on_a_row_are_refused(kind: str) -> None:
    config, reason = ADAPTERS[kind]
    with pytest.raises(ValueError, match=f"its adapter default {reason}"):
        preflight.refuse_adapters(get_peft_model(selftest.tiny_model("llama"), config))


def test_adapters_that_act_on_single_tokens_are_not_refused() -> None:
    preflight.refuse_adapters(selftest.tiny_model("llama"))
    preflight.refuse_adapters(get_peft_model(selftest.tiny_model("llama"), LoraConfig(use_dora=True)))


def test_no_lock_is_no_wait(tmp_path: Path) -> None:
    preflight.check_extension_locks(tmp_path)


def test_a_lock_of_a_dead_process_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = lock(tmp_path, age_s=10 * preflight.STALE_AFTER_S)
    with pytest.raises(ValueError, match="Delete that file") as caught:
        preflight.check_extension_locks(tmp_path)
    assert str(path) in str(caught.value)


def test_a_lock_whose_builder_works_in_the_folder_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lock(tmp_path, age_s=10 * preflight.STALE_AFTER_S)
    builder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=path.parent)
    release = threading.Timer(2.0, path.unlink)
    release.start()
    try:
        preflight.check_extension_locks(tmp_path)
    finally:
        release.join()
        builder.kill()
        builder.wait()
    assert f"waiting for the build that holds {path}" in capsys.readouterr().out


def test_a_fresh_lock_is_waited_for(tmp_path: Path) -> None:
    path = lock(tmp_path, age_s=0.0)
    release = threading.Timer(1.5, path.unlink)
    release.start()
    preflight.check_extension_locks(tmp_path)
    release.join()


def test_the_folder_is_torchs_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = lock(tmp_path, age_s=10 * preflight.STALE_AFTER_S)
    with pytest.raises(ValueError, match=str(path)):
        preflight.check_extension_locks()


@pytest.mark.parametrize("part", ["the model", "1", "0"])
def test_what_torch_compile_has_taken_is_refused(part: str) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    preflight.refuse_compiled(model)
    if part == "the model":
        model = torch.compile(model, backend="eager")
    elif part == "1":
        model[1].compile(backend="eager")
    else:
        model[0] = torch.compile(model[0], backend="eager")
    with pytest.raises(ValueError, match=f"torch.compile: {part} is compiled"):
        preflight.refuse_compiled(model)

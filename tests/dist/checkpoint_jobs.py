"""A raw run that saves in the middle, and runs that go on from there with other sizes, layouts or numbers of ranks."""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM

import ds_cp
from ds_cp import selftest
from tests.dist.jobs import Rows

STEPS, SAVED, LENGTH = 6, 3, 44
TAG = "middle"


class Packed(Dataset):
    """Rows of documents of other lengths in each."""

    def __init__(self, count: int) -> None:
        self.rows = Rows(count, LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        bounds = [0, 3 + index, 11 + 2 * index, LENGTH]
        positions = torch.cat([torch.arange(end - start) for start, end in pairwise(bounds)])
        return {**self.rows[index], "position_ids": positions}


def run(
    folder: str, block: dict[str, Any], stage: int, accumulation: int = 1, resume: str | None = None, save: bool = False
) -> tuple[list[float], dict[str, torch.Tensor] | None]:
    """Loss of the global batch in every step that this run takes, two rows a step, and the weights after them (rank 0).

    Args:
        resume: "as saved", or "universal" for the folder that `to_universal` wrote.
    """
    model = selftest.tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = selftest.ds_config(stage, {"loss_reduction": "token_mean", **block}, accumulation)
    config |= {"checkpoint": {"load_universal": True}} if resume == "universal" else {}
    engine, _, loader, _ = ds_cp.initialize(model=model, optimizer=optimizer, config=config, training_data=Packed(9))
    if resume is not None:
        where, tag = (folder, TAG) if resume == "as saved" else (f"{folder}/universal", TAG)
        path, state = engine.load_checkpoint(where, tag=tag)
        assert path is not None
        loader.load_state_dict(state["loader"])
        assert engine.global_steps == SAVED
    losses = []
    while engine.global_steps < STEPS:
        for batch in loader:
            losses.append(_micro_step(engine, batch))
            if engine.global_steps == SAVED and save and not Path(folder, "latest").exists():
                ds_cp.save_checkpoint(engine, folder, tag=TAG, client_state={"loader": loader.state_dict()})
            if engine.global_steps == STEPS:
                break
    weights = selftest.full_parameters(engine.module)
    selftest.finish(engine)
    return [sum(losses[i : i + accumulation]) for i in range(0, len(losses), accumulation)], (None if dist.get_rank() else weights)


def _micro_step(engine: Any, batch: dict[str, Any]) -> float:
    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()
    shown = loss.detach().double() / dist.get_world_size()
    dist.all_reduce(shown)
    return float(shown)


def to_universal(folder: Path) -> None:
    """DeepSpeed's own conversion."""
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(folder / TAG),
            output_folder=str(folder / "universal" / TAG),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def exported(folder: Path) -> torch.nn.Module:
    """DeepSpeed's consolidated weights as safetensors, read by transformers alone."""
    convert_zero_checkpoint_to_fp32_state_dict(str(folder), str(folder / "exported"), safe_serialization=True, tag=TAG)
    selftest.tiny_model("llama").config.save_pretrained(folder / "exported")
    return AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32)

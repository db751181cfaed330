"""Checkpoints that are whole, and a HF Trainer run that is told to stop."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ds_cp.models.attach import Handle, handle_of
from ds_cp.watch import Preemption

COMPLETE = "ds_cp_complete.json"
"""Written into a checkpoint when every rank has written its part: without it a checkpoint is not gone on from."""

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.utils.data import DataLoader

    class Host:
        """What the mixins in front of a `transformers.Trainer`, or of TRL's, find in it. For the type checker alone."""

        args: TrainingArguments
        state: TrainerState
        control: TrainerControl
        accelerator: Any
        model: nn.Module
        model_wrapped: nn.Module
        model_accepts_loss_kwargs: bool
        loss_is_scaled_for_ga: bool | None
        gather_function: Callable[..., Any]
        _signature_columns: list[str]
        ref_model: nn.Module
        num_generations: int
        num_generations_eval: int

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any: ...
        def add_callback(self, callback: TrainerCallback) -> None: ...
        def remove_callback(self, callback: TrainerCallback) -> None: ...
        def compute_loss(
            self,
            model: nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Tensor | tuple[Tensor, Any]: ...
        def prediction_step(
            self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
        ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...
        def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any: ...
        def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> Any: ...
        def log(self, logs: dict[str, float], start_time: float | None = None) -> None: ...
        def floating_point_ops(self, inputs: dict[str, Any]) -> int: ...
        def get_cp_size(self) -> int: ...
        def _load_rng_state(self, checkpoint: str | None) -> None: ...
        def _save_checkpoint(self, model: Any, trial: Any) -> None: ...
        def _get_output_dir(self, trial: Any) -> str: ...
        def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader: ...
        def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | int | None: ...
        def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None: ...
        def _prepare_inputs(self, inputs: Any) -> Any: ...
        def _set_signature_columns_if_needed(self) -> None: ...
        def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None: ...
        def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor: ...
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any: ...

else:
    Host = object


class Engine(Protocol):
    """What is used of a DeepSpeedEngine."""

    global_steps: int

    def save_checkpoint(self, save_dir: str, tag: str, client_state: dict[str, Any], save_latest: bool) -> bool: ...


class Reliable(Host):
    """Before `transformers.Trainer`: SIGTERM saves and ends the run on every rank after the same step; checkpoints are whole."""

    cp_handle: Handle | None = None
    cp_preempted: bool = False
    """The run was told to stop, has saved, and `train` has returned."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self.cp_handle is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint:
            _refuse_half(resume_from_checkpoint)
        told = Preemption()
        callback = _StopTogether(self, told)
        self.add_callback(callback)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.remove_callback(callback)
            told.restore()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """HF's, by rank; then the first rank's on all ranks of a row, which must draw alike: some may have saved none."""
        super()._load_rng_state(checkpoint)
        if self.cp_handle is None or checkpoint is None:
            return
        seq = self.cp_handle.mesh.seq
        found = [(random.getstate(), np.random.get_state(), torch.get_rng_state())]
        dist.broadcast_object_list(found, src=seq.ranks[0], group=seq.group, device=self.args.device)
        python, numpy, cpu = found[0]
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.cp_handle is None:
            return super()._save_checkpoint(model, trial)
        self.cp_handle.check_finite()  # of the last forward pass: nothing that is already lost replaces what is not
        watch = self.cp_handle.watch
        assert watch is not None
        watch.enter("save")
        super()._save_checkpoint(model, trial)
        dist.barrier()
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and folder.is_dir():
            _write_whole(folder / COMPLETE, json.dumps({"step": self.state.global_step, "ranks": dist.get_world_size()}))
        dist.barrier()
        watch.enter("after the step")
        return None


class _StopTogether(TrainerCallback):
    def __init__(self, trainer: Reliable, told: Preemption) -> None:
        self._trainer, self._told = trainer, told

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        handle = self._trainer.cp_handle
        assert handle is not None
        assert handle.watch is not None
        if handle.watch.stop_after(state.global_step, self._told.told):
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
            self._trainer.cp_preempted = True


def save_checkpoint(
    engine: nn.Module, folder: str | os.PathLike[str], tag: str | None = None, client_state: Mapping[str, Any] | None = None
) -> None:
    """`engine.save_checkpoint`, but `latest` names this checkpoint only when every rank has written its part, all at once.

    DeepSpeed writes `latest` when rank 0 is done, whatever becomes of the others. Every rank must call it.

    Raises:
        FloatingPointError: the last loss was not finite; nothing is saved.
    """
    handle, real = handle_of(engine), cast(Engine, engine)
    if handle is not None:
        assert handle.watch is not None
        handle.check_finite()
        handle.watch.enter("save")
    tag = tag or f"global_step{real.global_steps}"
    real.save_checkpoint(str(folder), tag=tag, client_state=dict(client_state or {}), save_latest=False)
    dist.barrier()
    if dist.get_rank() == 0:
        _write_whole(Path(folder) / "latest", tag)
    dist.barrier()
    if handle is not None:
        assert handle.watch is not None
        handle.watch.enter("after the step")


def should_stop(engine: nn.Module) -> bool:
    """Whether to save and leave the loop now: some rank was told to by SIGTERM. The same answer on every rank, after the same step.

    Every rank must ask after every `engine.step()`. From the first question on SIGTERM does not end the process; a second one does.
    Without sequence parallelism (size 1) it is always False, and SIGTERM ends the process as ever.
    """
    handle = handle_of(engine)
    if handle is None:
        return False
    if handle.preemption is None:
        handle.preemption = Preemption()
    assert handle.watch is not None
    return handle.watch.stop_after(cast(Engine, engine).global_steps, handle.preemption.told)


def last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a Trainer's output folder that was written to its end, or None.

    Where none has the mark (another program wrote them), the newest.
    """
    found = list(Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")) if Path(folder).is_dir() else []
    whole = [path for path in found if (path / COMPLETE).is_file()]
    if whole:
        return str(max(whole, key=lambda path: int(path.name.rsplit("-", 1)[1])))
    return get_last_checkpoint(str(folder)) if found else None


def _refuse_half(given: str) -> None:
    """Of a folder in which ds_cp has saved: other checkpoints there are whole, this one is not."""
    here = Path(given)
    if (here / COMPLETE).is_file() or not any(here.parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")):
        return
    raise ValueError(
        f"resume_from_checkpoint: {given} was not written to its end (it has no {COMPLETE}); use {last_checkpoint(here.parent)}"
    )


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)

"""HF Trainer runs for the workers; each resets accelerate's process-wide state, so that one pool can run many."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from transformers import Trainer as HfTrainer

import ds_cp
from ds_cp import mesh, selftest
from ds_cp.models import attach
from tests.dist.jobs import Rows


class Stream(IterableDataset):
    """The rows of `Rows` as a stream, in another order every epoch."""

    def __init__(self, count: int) -> None:
        self.rows, self.epoch = Rows(count), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.epoch))
        return iter(self.rows[i] for i in order.tolist())


class Drawn(Rows):
    """Rows of which the process that reads them draws a part, as one that masks or crops does."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        return {**row, "input_ids": torch.cat((row["input_ids"][:12], torch.randint(3, 96, (12,))))}


def flattened(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Rows as documents of one row."""
    labels = [torch.cat((torch.tensor([-100]), row["labels"][1:])) for row in rows]
    positions = [torch.arange(len(row["input_ids"])) for row in rows]
    whole = {"input_ids": [row["input_ids"] for row in rows], "labels": labels, "position_ids": positions}
    return {key: torch.cat(parts).unsqueeze(0) for key, parts in whole.items()}


class OwnLoaders(ds_cp.Trainer):
    """Loaders of the user's own, prepared by accelerate."""

    def get_train_dataloader(self) -> Any:
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=1, shuffle=True))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self.accelerator.prepare(DataLoader(self.eval_dataset, batch_size=2))


def train(
    folder: str,
    block: dict[str, Any] | None,
    stage: int | None = 1,
    data: Any = None,
    evaluation: Any = None,
    resume: str | None = None,
    metrics: bool = False,
    trainer: dict[str, Any] | None = None,
    model: tuple[str, dict[str, Any]] = ("qwen3", {}),
    kind: type[HfTrainer] | None = None,
    environment: dict[str, str] | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Trains a tiny model (type, changes to its config); `stage` None is plain HF without DeepSpeed.

    Returns logs, weights (rank 0) and what was seen.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DYNAMO_"))]:
        del os.environ[name]
    os.environ |= environment or {}
    settings = {
        "output_dir": folder,
        "use_cpu": True,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": [],
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
        **arguments,
    }
    if stage is not None:
        settings["deepspeed"] = deepspeed_section(block, stage)
    kind = kind or (ds_cp.Trainer if block is not None else HfTrainer)
    more = {**(trainer or {}), **({"compute_metrics": whole_row_metrics} if metrics else {})}
    built = kind(
        model=selftest.tiny_model(model[0], **model[1]),
        args=(Seq2SeqTrainingArguments if "predict_with_generate" in settings else TrainingArguments)(**settings),
        train_dataset=data or Rows(16),
        eval_dataset=evaluation or Rows(5),
        **more,
    )
    built.train(resume_from_checkpoint=resume)
    weights = selftest.full_parameters(built.model)
    handle = attach.handle_of(built.model)
    if handle is not None:
        handle.remove()
        mesh.destroy(handle.mesh)
    if stage is not None:
        built.accelerator.deepspeed_engine_wrapped.engine.destroy()
    return {"logs": built.state.log_history, "weights": weights if built.args.process_index == 0 else None}


def deepspeed_section(block: dict[str, Any] | None, stage: int) -> dict[str, Any]:
    section = {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }
    return section if block is None else {**section, "sequence_parallel": block}


def whole_row_metrics(prediction: Any) -> dict[str, float]:
    """Next-token accuracy, and the shapes that it was computed from."""
    logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
    right = (logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100].float().mean()
    return {
        "rows": logits.shape[0],
        "tokens": logits.shape[1],
        "logit_sum": float(logits.double().abs().sum()),
        "right": float(right),
    }


def custom_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return outputs.logits.sum()

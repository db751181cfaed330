"""HF Trainer under sequence parallelism: the same arguments, rows counted by sequence group.

`TrainerMixin` goes in front of any Trainer subclass. It attaches the model, gives every rank of a group the same rows, counts
the targets of a whole optimizer step, and leaves everything else (accumulation, clipping, saving, schedules) to HF.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Mapping, Sized
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer as HfTrainer
from transformers import TrainingArguments

from ds_cp import agreement, comm, config, engine, factor, launch, meter, preflight, trainer_checks, trl_trainers
from ds_cp.batch import DOCUMENT_KEYS, count_targets
from ds_cp.deal import Passes
from ds_cp.mesh import Mesh
from ds_cp.reliable import Reliable

ALIKE = (
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs"),
    *("seed", "data_seed", "dataloader_drop_last", "eval_strategy", "eval_steps", "eval_delay", "save_strategy", "save_steps"),
    *("logging_strategy", "logging_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim", "label_smoothing_factor", "average_tokens_across_devices", "gradient_checkpointing", "bf16", "fp16"),
    *("activation_checkpointing", "neftune_noise_alpha", "train_sampling_strategy"),
    *("dataloader_in_order", "dataloader_num_workers"),
)
"""Arguments that ranks with different ones would wait for each other over, or train otherwise."""


class TrainerMixin(trl_trainers.Rows, Reliable):
    """Put in front of `transformers.Trainer` or a subclass: `class SFT(ds_cp.TrainerMixin, trl.SFTTrainer): ...`.

    Needs `TrainingArguments(deepspeed=...)` whose config has a `sequence_parallel` block; with size 1, or without the block, the
    class behind it is unchanged. `per_device_train_batch_size` counts rows per sequence group.

    Raises:
        ValueError: from the constructor, on every rank: the model, the sizes, the launch or an argument is not supported.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ds_config = _deepspeed_config(self)
        _agree(self.args, ds_config)
        block = config.parse(ds_config)
        _settle_auto(ds_config, self.accelerator.num_processes)
        if block.size == 1:
            launch.say_off(block)
            return
        _check_launch(self.accelerator.num_processes)
        self.cp_trl = trl_trainers.trainer_of(self)
        own_workers = self.cp_trl == "GRPOTrainer"  # none for a stream to evaluate on
        workers = 0 if own_workers else self.args.dataloader_num_workers
        replicas = 1 if block.size == "auto" else max(1, self.accelerator.num_processes // block.size)
        trainer_checks.refuse(self, replicas, workers)
        if self.cp_trl is not None:
            trl_trainers.refuse(self, self.cp_trl, block)
        mesh, methods = engine.prepare(self.model, block, ds_config)
        factor.verify(ds_config, backward_divides=False)  # HF passes scale_wrt_gas=False
        here, steps = weakref.ref(self), self.args.gradient_accumulation_steps
        self.cp_handle = engine.attach_model(
            self.model,
            block,
            mesh,
            divisor=lambda: 1,
            methods=methods,
            steps=lambda: getattr(here(), "current_gradient_accumulation_steps", steps),
        )
        assert self.cp_handle.watch is not None
        self.cp_handle.watch.follow(self, "state.global_step")
        self.cp_mesh = mesh
        if self.cp_trl is not None:
            self.begin_trl()
        else:
            if block.loss_reduction in ("mean", "sum"):
                self.model_accepts_loss_kwargs = False  # no num_items_in_batch
            self.loss_is_scaled_for_ga = {"mean": False, "token_mean": True, "sum": True}.get(block.loss_reduction)
        self._cp_tokens, self._cp_paused = 0, 0.0
        self._cp_clock: float | None = None
        self._cp_figures: dict[str, float] = {}
        self.accelerator.dataloader_config.dispatch_batches = False  # every rank reads a stream itself

    def _cp_meter(self) -> meter.Meter:
        assert self.cp_handle is not None
        assert self.cp_handle.meter is not None
        return self.cp_handle.meter

    def get_cp_size(self) -> int:
        """Ranks that share a row, by which HF divides the global batch."""
        return super().get_cp_size() if self.cp_mesh is None else self.cp_mesh.seq.size

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of the whole rows: `ds_cp.loss` has applied the reduction, so nothing is multiplied here."""
        if self.cp_mesh is None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._count_tokens(inputs)
        if self.cp_trl is not None:
            with self.rows_as_processes():
                return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        keywords = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        keywords["label_smoothing"] = self.args.label_smoothing_factor
        outputs = model(**inputs, **keywords)
        if outputs.loss is None:
            raise ValueError("batch: no labels, so the model returned no loss; add `labels` to what the collator returns")
        # At ZeRO 0 DeepSpeed takes an engine's own output for a loss that `backward` did not scale, and divides it once more.
        loss = outputs.loss * 1.0
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Sharded evaluation; logits, where metrics ask for them, are those of the whole rows."""
        if self.cp_mesh is not None and self.cp_trl is None:
            self._cp_rows = len(_tokens(inputs))
        if self.cp_mesh is None or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        if self.cp_trl is not None:
            raise ValueError(f"predict: {self.cp_trl} would return the logits of a shard; call evaluate, or predict in one process")
        inputs = self._prepare_inputs(inputs)
        items = self._get_num_items_in_batch([inputs], self.args.device)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, {**inputs, "return_logits": True}, True, num_items_in_batch=items)
            logits = engine.unshard(outputs.logits)
        return loss.detach(), logits.detach(), inputs.get("labels")

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        if self.cp_mesh is None:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        _share_rows(dataloader, self.cp_mesh)  # of a get_eval_dataloader of the user's own
        start = time.perf_counter()
        self._cp_meter().rest()
        self.gather_function = self._gather_rows
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self._cp_paused += time.perf_counter() - start

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """HF's log, with `tokens_per_second` of the whole job and what `ds_cp.stats` gives beside every training loss."""
        if self.cp_mesh is not None and "loss" in logs and self._cp_clock is not None:
            now = time.perf_counter()
            seconds = now - self._cp_clock - self._cp_paused
            logs = {**logs, "tokens_per_second": round(self._cp_tokens * self.cp_mesh.data.size / max(seconds, 1e-9), 1)}
            logs, self._cp_figures = {**logs, **self._cp_figures}, {}
            self._cp_tokens, self._cp_paused, self._cp_clock = 0, 0.0, now
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.cp_mesh is not None and self.control.should_log:  # here, because `log` may be called on one rank
            self._cp_figures = self._cp_meter().read()
            meter.write(self.model_wrapped, self._cp_figures)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.cp_mesh is not None:
            self._cp_meter().rest()
        super()._save_checkpoint(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return super().floating_point_ops(inputs) // self.get_cp_size()  # HF sums over ranks, which share the row

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        if self.cp_mesh is not None and isinstance(dataset, IterableDataset):
            dataset = _stream(dataset, self.args.dataloader_num_workers, self.cp_mesh, is_training)
        loader = super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        if self.cp_mesh is not None and not _share_rows(loader, self.cp_mesh):
            raise ValueError(
                f"data: {type(loader).__name__} does not shard by process in a way ds_cp knows; pass a map-style dataset or an "
                "IterableDataset"
            )
        return loader

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> Any:
        if self.cp_mesh is not None:
            _share_rows(dataloader, self.cp_mesh)  # of a get_train_dataloader of the user's own, which accelerate has prepared
        return super().set_initial_training_values(args, dataloader)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | int | None:
        if self.cp_mesh is None:
            return super()._get_num_items_in_batch(batch_samples, device)
        labelled = all("labels" in batch or "shift_labels" in batch for batch in batch_samples)
        if not (self.model_accepts_loss_kwargs and batch_samples and labelled):
            return None
        local = torch.stack([count_targets(batch).to(device) for batch in batch_samples]).sum()
        if self.args.average_tokens_across_devices:
            return comm.all_sum(local, self.cp_mesh.data.group)
        if self.cp_trl is not None:
            return local
        return local * self.cp_mesh.data.size  # each replica divides by its own count, then replicas are averaged

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.cp_mesh is not None:
            extra = [key for key in (*DOCUMENT_KEYS, "shift_labels", "loss_weights") if key not in self._signature_columns]
            self._signature_columns = [*self._signature_columns, *extra]

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self.get_cp_size()

    def _count_tokens(self, inputs: Mapping[str, Any]) -> None:
        self._cp_clock = time.perf_counter() if self._cp_clock is None else self._cp_clock
        keys = [key for key in ("prompt_ids", "completion_ids") if key in inputs]  # of GRPO
        tokens = [inputs[key] for key in keys] or [_tokens(inputs)]
        self._cp_tokens += sum(part.shape[0] * part.shape[1] for part in tokens)

    def _gather_rows(self, tensors: Any) -> Any:
        """One entry per row from all replicas, without the repeats that accelerate added to even the last batch."""
        state, mesh = self.accelerator.gradient_state, self.cp_mesh
        assert mesh is not None
        remainder = state.remainder if state.end_of_dataloader else -1
        # HF repeats a loss by the batch size of the arguments, also that of a stream's last and shorter batch. Rows of other
        # batches are no measure: a collator may have joined them.
        if mesh.data.size == 1 and self.cp_trl is None and state.end_of_dataloader and remainder < 0:
            remainder = self._cp_rows

        def once(x: Tensor) -> Tensor:
            rows = trl_trainers.one_per_group(x, mesh)
            return rows[:remainder] if remainder > 0 else rows

        return recursively_apply(once, self.accelerator.gather(tensors))


class Trainer(TrainerMixin, HfTrainer):
    """`transformers.Trainer` whose rows may be longer than one GPU: see `TrainerMixin`."""


def _tokens(inputs: Mapping[str, Any]) -> Tensor:
    """[B, S] or [B, S, D]."""
    return inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]


def _deepspeed_config(trainer: HfTrainer) -> Mapping[str, Any]:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        raise ValueError(
            "ds_cp.Trainer: DeepSpeed is not active, so there is no sequence_parallel block to read; pass "
            "TrainingArguments(deepspeed='ds_config.json')"
        )
    return plugin.deepspeed_config


def _settle_auto(ds_config: Mapping[str, Any], processes: int) -> None:
    """Leaves no "auto" in the block of HF's own copy: accelerate refuses every "auto" that it cannot fill in itself.

    What is left out of the block is "auto" anyway, and parsing it again gives the same.
    """
    block = ds_config.get(config.BLOCK, {})
    if block.get("size") == "auto":
        block["size"] = processes
    for key in [key for key, value in block.items() if value == "auto"]:
        del block[key]


def _agree(args: TrainingArguments, ds_config: Mapping[str, Any]) -> None:
    """Before anything on this rank alone can be refused: what the ranks were given."""
    if not dist.is_initialized():
        return  # _check_launch has the reason
    given = {f"TrainingArguments.{name}": getattr(args, name) for name in ALIKE if hasattr(args, name)}
    agreement.agree({**given, **agreement.of_config(ds_config)}, agreement.CONFIG)
    agreement.agree(agreement.packages(), agreement.INSTALL)


def _check_launch(processes: int) -> None:
    launched = preflight.launched()
    if processes != launched:
        raise ValueError(
            f"world size: the launcher started {launched} ranks, accelerate sees {processes}, so every rank would train on the "
            "same rows; on CPU pass TrainingArguments(use_cpu=True) (--use_cpu)"
        )


def _stream(dataset: IterableDataset, workers: int, mesh: Mesh, is_training: bool) -> IterableDataset:
    """A stream as accelerate shards it: without a length, training goes over it pass after pass."""
    trainer_checks.refuse_stream(dataset, workers, 1 if is_training else mesh.data.size)
    return Passes(dataset) if is_training and not isinstance(dataset, Sized) else _Plain(dataset)


class _Plain(IterableDataset):
    """A stream of any kind as one of PyTorch's, which accelerate does not shard by the kind's own rules."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def _share_rows(loader: DataLoader, mesh: Mesh) -> bool:
    """Makes accelerate's shard of the data that of this rank's sequence group; False where there is none of a kind it knows."""
    inner = getattr(loader, "base_dataloader", loader)  # of accelerate's wrapping
    seeds = inner.worker_init_fn
    if isinstance(seeds, partial) and "rank" in seeds.keywords:  # HF's: workers that draw (crops, masks) draw by global rank
        inner.worker_init_fn = partial(seeds.func, **{**seeds.keywords, "rank": mesh.data.rank})
    parts: tuple[Any, Any] = getattr(loader, "batch_sampler", None), getattr(loader, "dataset", None)
    for part in parts:
        if hasattr(part, "process_index") and hasattr(part, "num_processes"):
            part.num_processes, part.process_index = mesh.data.size, mesh.data.rank
            if mesh.data.size == 1:  # as in one process: a short last batch stays short
                if hasattr(part, "even_batches"):
                    part.even_batches = False
                else:
                    part.batch_size = 1  # of accelerate's shard of a stream, which completes groups of so many rows
            return True
    return mesh.topology.world == 1

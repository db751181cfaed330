"""Arguments of HF's Trainer that would be wrong over shared rows, or fail long after the first step: refused by name before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Trainer


def refuse(trainer: Trainer, replicas: int, eval_workers: int) -> None:
    """Raises ValueError for the first of them; ranks have the same arguments.

    Args: replicas: groups of ranks that share a row. eval_workers: that read a stream to evaluate on.
    """
    args = trainer.args
    refused = {
        "compute_loss_func": (trainer.compute_loss_func is not None, "leave it out: it would see one shard's logits"),
        "model_init": (trainer.model_init is not None, "pass the model itself"),
        "use_liger_kernel": (args.use_liger_kernel, "set it to False"),
        "torch_compile": (args.torch_compile, "set it to False"),
        "dynamo_backend": (_is_compiled_later(trainer), "take it out of accelerate's launch and config: it compiles the model"),
        "parallelism_config": (_splits_rows(args.parallelism_config), "leave it out: the sequence_parallel block takes its place"),
        "auto_find_batch_size": (args.auto_find_batch_size, "set it to False"),
        "enable_jit_checkpoint": (args.enable_jit_checkpoint, "set it to False: SIGTERM saves and stops all ranks together anyway"),
        "neftune_noise_alpha": (
            args.neftune_noise_alpha is not None,
            "leave it out: its noise is scaled by the length of what an embedding sees, which is a shard's",
        ),
        "dataloader_in_order": (
            not args.dataloader_in_order and args.dataloader_num_workers > 1,
            "leave it True: the ranks of a sequence group would get rows in different orders",
        ),
        "train_sampling_strategy: batch_rebalance": (
            args.train_sampling_strategy == "batch_rebalance",
            "take random, sequential or group_by_length: it hands out rows by global rank",
        ),
        "predict_with_generate": (
            getattr(args, "predict_with_generate", False),
            "set it to False, and generate inside `with ds_cp.disabled(trainer.model):`",
        ),
        "eval_use_gather_object": (args.eval_use_gather_object, "set it to False: only tensors are gathered from whole rows"),
    }
    for name, (given, advice) in refused.items():
        if given:
            raise ValueError(f"{name}: not in this version of ds_cp under sequence parallelism; {advice}")
    _refuse_batches(trainer, replicas)
    if args.eval_strategy != "no" or args.eval_on_start:
        evaluated = trainer.eval_dataset
        for dataset in evaluated.values() if isinstance(evaluated, Mapping) else [evaluated]:
            refuse_stream(dataset, eval_workers, replicas)


def refuse_stream(dataset: Any, workers: int, replicas: int) -> None:
    """Raises ValueError for a stream that would be read by several workers, or by several replicas (1 where that does no harm)."""
    if not isinstance(dataset, IterableDataset):
        return
    if workers > 1:
        raise ValueError(
            f"dataloader_num_workers: got {workers} for an IterableDataset, allowed 0 and 1: each worker would read the whole "
            "stream, and every row would come once a worker"
        )
    if replicas > 1:
        raise ValueError(
            f"eval_dataset: an IterableDataset over {replicas} replicas would be evened out with rows that come twice; pass "
            "one with a length and an index"
        )


def _refuse_batches(trainer: Trainer, replicas: int) -> None:
    config = trainer.args.accelerator_config
    if config.split_batches or config.dispatch_batches:
        raise ValueError(
            "accelerator_config: split_batches and dispatch_batches hand out batches by global rank, but the ranks of a sequence "
            "group need the same row; leave both unset"
        )
    if not config.even_batches and replicas > 1 and not trainer.args.dataloader_drop_last:
        raise ValueError(
            f"accelerator_config.even_batches: False lets {replicas} replicas have different numbers of batches, and the last step "
            "of an epoch would wait for ever; leave it True, or set dataloader_drop_last"
        )


def _is_compiled_later(trainer: Trainer) -> bool:
    """By accelerate, when it prepares the model: its launcher sets this where the arguments do not."""
    return trainer.accelerator.state.dynamo_plugin.backend.value != "NO"


def _splits_rows(parallelism: Any) -> bool:
    """Of accelerate's: whether its ranks share rows or layers, as DeepSpeed's ALST makes them."""
    return parallelism is not None and parallelism.non_data_parallel_size > 1

"""Trains a Hugging Face causal language model on text, sequence parallel where the DeepSpeed config says so.

    deepspeed scripts/train.py --deepspeed ds_configs/hybrid.json --model Qwen/Qwen3-0.6B --data notes/ --seq_length 131072 \
        --bf16 --gradient_checkpointing --output_dir runs/notes
    DS_ACCELERATOR=cpu deepspeed --num_accelerators 4 scripts/train.py --use_cpu --deepspeed ds_configs/hybrid.json \
        --model_type qwen3 --config_overrides hidden_size=64,num_hidden_layers=2 --max_steps 20
    deepspeed scripts/train.py --deepspeed ds_configs/hybrid.json --model_type qwen3_vl --data shapes     # drawn pictures, captions

All arguments of transformers.TrainingArguments hold; `--help` lists them after these. Without --deepspeed it is one plain
transformers.Trainer run. The output folder gets metrics.jsonl, loss.png and, unless --save_strategy is no, the model.

A model from scratch starts from other weights under ZeRO-3 than without it: transformers draws them in another order. To compare
two runs give both the same stage, or start both from one saved --model.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from train_data import DataArguments, PackedRows, byte_tokenizer, looks_local, write_rows
from train_images import ROWS, SHAPES, Shapes, collate, token_ids, tokenizer_for_images
from train_plot import MetricsFile, differences, draw, read
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    HfArgumentParser,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import ds_cp
from ds_cp import preflight

T = TypeVar("T")
FIRST_RANK_SPEAKS_S = 5.0


@dataclass
class ModelArguments:
    """What to train: exactly one of --model, --config and --model_type."""

    model: str | None = field(default=None, metadata={"help": "hub name or folder of a model to go on from"})
    config: str | None = field(default=None, metadata={"help": "config.json, or a folder with one: from scratch"})
    model_type: str | None = field(default=None, metadata={"help": "architecture, as qwen3 or llama: from scratch"})
    config_overrides: str = field(
        default="",
        metadata={"help": "key=value,...: changes to the config of a model from scratch; text_config.key=value within it"},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "hub name or folder; default: the model's, or bytes from scratch"}
    )

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.model, self.config, self.model_type)) != 1:
            raise ValueError("give exactly one of --model, --config and --model_type")
        for name in ("model", "config", "tokenizer"):
            given = getattr(self, name)
            if given is not None and looks_local(given) and not Path(given).exists():
                raise ValueError(f"--{name} {given}: no such file or folder")
        if self.model is not None and self.config_overrides:
            raise ValueError("--config_overrides changes a model from scratch; with --model it would not fit the weights")


@dataclass
class TrainArguments(TrainingArguments):
    """TrainingArguments, and what this script does with the metrics."""

    output_dir: str = field(default="runs/train", metadata={"help": "folder of the metrics, the picture, checkpoints, the model"})
    logging_steps: float = field(default=1, metadata={"help": "log every so many steps, or that part of all steps below 1"})
    compare: str | None = field(default=None, metadata={"help": "metrics.jsonl of another run, to be drawn in the same picture"})
    name: str | None = field(default=None, metadata={"help": "this run's name in the picture; default: the output folder's"})

    def __post_init__(self) -> None:
        if self.compare is not None and not Path(self.compare).is_file():
            raise ValueError(f"--compare {self.compare}: no such file")
        super().__post_init__()


def main() -> None:
    try:
        trainer, args, metrics = prepare()
    except ValueError as error:  # every rank has it; one sentence, which as many tracebacks as ranks would bury
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(FIRST_RANK_SPEAKS_S)  # a launcher ends all ranks with the first that ends
        print(f"train.py: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    trainer.train(resume_from_checkpoint=resume_from(args))
    if getattr(trainer, "cp_preempted", False):
        print(f"stopped and saved after step {trainer.state.global_step}; go on with --resume_from_checkpoint true")
        torch.distributed.destroy_process_group()
        return
    if trainer.eval_dataset is not None and not was_evaluated(trainer):
        trainer.evaluate()
    if args.save_strategy != "no":
        trainer.save_model()
    if trainer.is_world_process_zero():
        report(args, metrics)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def prepare() -> tuple[Trainer, TrainArguments, Path]:
    """All that can be refused, before the first step.

    Raises:
        ValueError: on every rank: what was given is wrong.
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainArguments))
    if any(argument.startswith("--deepspeed") for argument in sys.argv):
        ds_cp.init_distributed()  # before TrainingArguments, for which accelerate would make torch's group alone
    model_args, data_args, args = together(parser.parse_args_into_dataclasses)
    set_seed(args.seed)
    pictures = data_args.data == SHAPES
    tokenizer = together(lambda: load_tokenizer(model_args, pictures))
    config = together(lambda: load_config(model_args, tokenizer, pictures))
    train_rows, eval_rows = load_rows(data_args, args, tokenizer, config)
    trainer = trainer_class(args)(
        model=load_model(model_args, args, config),
        args=args,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        data_collator=collate if pictures else default_data_collator,
    )
    metrics = Path(args.output_dir) / "metrics.jsonl"
    rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    trainer.add_callback(MetricsFile(metrics, tokens_per_step=rows_per_step * data_args.seq_length))
    return trainer, args, metrics


def together(work: Callable[[], T]) -> T:
    """What `work` returns; what one rank refuses, all refuse. It must not communicate."""
    return preflight.together(work) if torch.distributed.is_initialized() else work()


def was_evaluated(trainer: Trainer) -> bool:
    """Whether --eval_strategy has evaluated the model as it is at the end."""
    return any("eval_loss" in log and log["step"] == trainer.state.global_step for log in trainer.state.log_history)


def trainer_class(args: TrainArguments) -> type[Trainer]:
    """ds_cp's Trainer under DeepSpeed; without a DeepSpeed config there is no block to read."""
    return Trainer if args.deepspeed is None else ds_cp.Trainer


def load_tokenizer(model_args: ModelArguments, pictures: bool) -> PreTrainedTokenizerBase:
    name = model_args.tokenizer or model_args.model
    if name is not None:
        return AutoTokenizer.from_pretrained(name)
    return tokenizer_for_images() if pictures else byte_tokenizer()


def load_rows(
    data_args: DataArguments, args: TrainArguments, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> tuple[Any, Any]:
    """Packs the text once a host, and every rank maps the result; pictures are drawn where they are asked for."""
    if data_args.data == SHAPES:
        return Shapes(config, tokenizer, data_args.seq_length, data_args.max_rows or ROWS).split(data_args.eval_rows)
    path = Path(args.output_dir) / "rows.bin"
    together(lambda: write_rows(path, data_args, tokenizer) if args.local_process_index == 0 else None)
    return together(lambda: PackedRows(path, data_args.seq_length).split(data_args.eval_rows))


def load_model(model_args: ModelArguments, args: TrainArguments, config: PretrainedConfig) -> PreTrainedModel:
    """The model, in fp32 unless DeepSpeed keeps fp32 master weights of a bf16 model."""
    dtype = torch.bfloat16 if args.bf16 and args.deepspeed is not None else torch.float32
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    if model_args.model is not None:
        return kind.from_pretrained(model_args.model, dtype=dtype)
    return kind.from_config(config, dtype=dtype)


def load_config(model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase, pictures: bool = False) -> PretrainedConfig:
    """The model's, or one from scratch: the tokenizer's vocabulary and special tokens, then --config_overrides."""
    if model_args.model is not None:
        return AutoConfig.from_pretrained(model_args.model)
    load = AutoConfig.for_model if model_args.config is None else AutoConfig.from_pretrained
    source = model_args.config or model_args.model_type
    known = load(source).to_dict()
    inner = "text_config." if isinstance(known.get("text_config"), dict) else ""
    changes: dict[str, Any] = {f"{inner}vocab_size": len(tokenizer)}
    changes |= {f"{inner}{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    changes |= token_ids(tokenizer) if pictures else {}
    for item in filter(None, model_args.config_overrides.split(",")):
        key, _, value = item.partition("=")
        if key not in (names := list(dotted(known))):
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]
            raise ValueError(f"--config_overrides {key}: not in this config; did you mean {near!r}?")
        changes[key] = parse_value(value)
    parts = {name: dict(known[name]) for name in (key.rpartition(".")[0] for key in changes) if name}
    for key, value in changes.items():
        part, _, name = key.rpartition(".")
        (parts[part] if part else parts)[name] = value
    return load(source, **parts)


def dotted(known: dict[str, Any]) -> Iterator[str]:
    """The keys of a config, those of a config within it as `text_config.hidden_size`."""
    for key, value in known.items():
        yield key
        if isinstance(value, dict) and key.endswith("_config"):
            yield from (f"{key}.{name}" for name in value)


def parse_value(text: str) -> Any:
    """A JSON value, or the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def resume_from(args: TrainArguments) -> str | bool | None:
    """A checkpoint's folder; `true` takes the last one of the output folder."""
    given = args.resume_from_checkpoint
    return given.lower() == "true" if given is not None and given.lower() in ("true", "false") else given


def report(args: TrainArguments, metrics: Path) -> None:
    """Draws the loss curve and says how far it is from the other run's."""
    ours, picture = read(metrics), Path(args.output_dir) / "loss.png"
    name = args.name or Path(args.output_dir).name
    if args.compare is None:
        draw(picture, name, ours)
    else:
        other = Path(args.compare)
        theirs = read(other)
        draw(picture, name, ours, other.parent.name, theirs)
        gaps = differences(ours, theirs)
        if gaps:
            step = max(gaps, key=gaps.__getitem__)
            print(f"largest difference of the loss from {other}: {gaps[step]:.2e}, at step {step} of {len(gaps)} compared")
        else:
            print(f"no step is both in {metrics} and in {other}")
    print(f"loss curve: {picture}")


if __name__ == "__main__":
    main()

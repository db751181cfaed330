"""The metrics of a run: written as JSON lines while it trains, compared with another run's, drawn."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

STATS = ("tokens", "step_seconds", "tokens_per_second_per_gpu", "tflops_per_gpu", "mfu", "imbalance", "attention_imbalance")
EXPOSED = ("exposed_ring", "exposed_exchange")
FIGURES = (*STATS, *EXPOSED)
"""Of ds_cp's meter."""
KEYS = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "eval_loss", *FIGURES)

Metrics = list[dict[str, float]]


class MetricsFile(TrainerCallback):
    """One JSON line for every log of rank 0: the step and what of `KEYS` was logged.

    A run that resumes keeps the lines up to the checkpoint's step. `tokens_per_second` is the Trainer's where it logs one, else
    measured here, without evaluation.

    Args:
        tokens_per_step: tokens of one optimizer step of the whole job.
    """

    def __init__(self, path: Path, tokens_per_step: int) -> None:
        self.path, self.tokens_per_step = path, tokens_per_step
        self.since: tuple[int, float] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept = [line for line in read(self.path) if line["step"] <= state.global_step] if self.path.exists() else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.since = self.since or (state.global_step, time.perf_counter())

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.since = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        line = {key: float(logs[key]) for key in KEYS if key in (logs or {})}
        if not state.is_world_process_zero or not line.keys() & {"loss", "eval_loss"}:
            return
        if "loss" in line and self.since is not None:
            step, start = self.since
            now = time.perf_counter()
            line.setdefault("tokens_per_second", round((state.global_step - step) * self.tokens_per_step / (now - start), 1))
            self.since = (state.global_step, now)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **line}) + "\n")


def read(path: Path) -> Metrics:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def curve(metrics: Metrics, key: str = "loss") -> dict[int, float]:
    """Step to value, for the lines that have one."""
    return {line["step"]: line[key] for line in metrics if key in line}


def differences(ours: Metrics, theirs: Metrics) -> dict[int, float]:
    """Absolute difference of the losses at every step that both have."""
    a, b = curve(ours), curve(theirs)
    return {step: abs(a[step] - b[step]) for step in sorted(a.keys() & b.keys())}


def draw(path: Path, name: str, metrics: Metrics, other_name: str = "", other: Metrics | None = None) -> None:
    """The loss curve as a picture; with another run its curve in the same axes and the difference below."""
    from matplotlib.figure import Figure

    gaps = differences(metrics, other) if other else {}
    figure = Figure(figsize=(8, 6 if gaps else 4.5), layout="constrained")
    heights = [3, 1] if gaps else [1]
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    losses = curve(metrics)
    axes[0].plot(losses.keys(), losses.values(), color="tab:blue", linewidth=3.5, alpha=0.55, label=name)
    if evals := curve(metrics, "eval_loss"):
        axes[0].plot(evals.keys(), evals.values(), "o", color="tab:orange", label=f"{name}, evaluation")
    if other:
        losses = curve(other)
        axes[0].plot(losses.keys(), losses.values(), color="black", linewidth=1, linestyle="--", label=other_name)
    axes[0].set_ylabel("loss")
    axes[0].legend(frameon=False)
    if gaps:
        axes[1].plot(gaps.keys(), gaps.values(), color="tab:red", linewidth=1)
        axes[1].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes[1].set_ylabel("difference")
    axes[-1].set_xlabel("step")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)

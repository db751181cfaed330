"""scripts/examples/ over shards against scripts/examples/upstream/ in one process, 20 steps: every loss and metric that TRL logs.

The sharded scripts run one after another in the same ranks; one of them is started by accelerate's launcher too. Adapters are drawn
at random, in another order under ZeRO-3, so scripts with them run at stages 1 and 2 (ZeRO-3 with adapters:
tests/dist/test_peft.py), and without dropout, of which every rank draws its own tokens'.
"""

from __future__ import annotations

import difflib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3 import Qwen3Config

from scripts import train_data, train_plot
from tests.ports import free_port
from tests.warm import Warm

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "scripts" / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
TIMEOUT_S = 600
STEPS = 20
TOLERANCE = 1e-4
CLOCKS = ("runtime", "per_second", "step_time", "total_flos")
"""Parts of the names of logged values that are not compared; what of a run takes how long."""
NO_MARGIN = 1e-6
"""Before the first update policy and reference are the same, and which of two rewards that are 0 is larger is their rounding's."""
RARE = ("grad_norm",)
"""Logged by one side only: DeepSpeed knows no norm at ZeRO 0."""

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}|{% endif %}{% endfor %}"
)
COMMON = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": STEPS,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_grad_norm": 0,
    "lr_scheduler_type": "constant",
}
SGD = {"optim": "sgd", "learning_rate": 0.1}
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0, "learning_rate": 1e-3}
GROUPS = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 16}
EVAL = {"eval_strategy": "steps", "eval_steps": 10, "per_device_eval_batch_size": 2}

RUNS: dict[str, tuple[str, str, tuple[int, int, int], dict[str, Any]]] = {
    "sft_packed_lora": (
        "sft",
        "text",
        (2, 1, 2),
        {"packing": True, "max_length": 96, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, **LORA, **EVAL},
    ),
    "sft_completions": (
        "sft",
        "completions",
        (3, 2, 1),
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **SGD, **EVAL},
    ),
    "sft_assistant_masks": (
        "sft",
        "chat",
        (1, 2, 1),
        {
            "assistant_only_loss": True,
            "packing": True,
            "max_length": 128,
            "per_device_train_batch_size": 2,
            "loss_type": "dft",
            **SGD,
        },
    ),
    "sft_dora": (
        "sft",
        "text",
        (2, 1, 2),
        {"packing": True, "max_length": 96, "per_device_train_batch_size": 1, "use_dora": True, **LORA},
    ),
    "dpo": ("dpo", "pairs", (3, 1, 2), {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **SGD, **EVAL}),
    "dpo_lora": ("dpo", "pairs", (2, 2, 1), {"per_device_train_batch_size": 2, "loss_type": ["sigmoid", "sft"], **LORA}),
    "grpo": ("grpo", "prompts", (3, 1, 2), {"gradient_accumulation_steps": 2, "beta": 0.04, **GROUPS, **SGD}),
    "grpo_lora": ("grpo", "prompts", (2, 2, 1), {"num_iterations": 2, "temperature": 0.8, "beta": 0.04, **GROUPS, **LORA}),
}
"""name -> script, data, (ZeRO stage, ulysses, ring), arguments."""

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "label_smoothing": (
        "sft",
        {"label_smoothing_factor": 0.1},
        "label_smoothing_factor: not in this version of ds_cp with SFTTrainer",
    ),
    "torch_compile": ("sft", {"torch_compile": True}, "torch_compile: not in this version of ds_cp"),
    "sum": ("sft", {"deepspeed": "sum"}, "sequence_parallel.loss_reduction: got sum, allowed auto, because SFTTrainer"),
    "grpo_evaluated": (
        "grpo_evaluated",
        {"eval_strategy": "steps", "per_device_eval_batch_size": 2, **GROUPS},
        "per_device_eval_batch_size: 2 rows of each of 1 replicas are 2, which num_generations_eval = 4 must divide",
    ),
    "reward": ("reward", {}, "RewardTrainer: TRL's trainer is not in this version of ds_cp"),
}
"""name -> script, arguments more than those of plain text, beginning of the sentence."""


def words(rng: random.Random, least: int, most: int) -> str:
    known = ["the", "ring", "sends", "keys", "and", "values", "while", "every", "rank", "attends", "to", "what", "it", "holds"]
    return " ".join(rng.choice(known) for _ in range(rng.randint(least, most)))


def turns(rng: random.Random) -> list[dict[str, str]]:
    return [{"role": role, "content": words(rng, 2, 10)} for _ in range(2) for role in ("user", "assistant")]


DATA = {
    "text": lambda rng: {"text": words(rng, 3, 30)},
    "completions": lambda rng: {"prompt": words(rng, 3, 9) + " ", "completion": words(rng, 2, 20)},
    "chat": lambda rng: {"messages": turns(rng)},
    "pairs": lambda rng: {"prompt": words(rng, 3, 9) + " ", "chosen": words(rng, 2, 12), "rejected": words(rng, 2, 12)},
    "prompts": lambda rng: {"prompt": words(rng, 3, 9) + " "},
}


def save_model(folder: Path) -> Path:
    tokenizer = train_data.byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    AutoModelForCausalLM.from_config(Qwen3Config(initializer_range=0.2, **sizes, **heads)).save_pretrained(folder)
    return folder


def write_data(folder: Path) -> None:
    rng = random.Random(0)
    for name, make in DATA.items():
        for split, rows in (("train", 40), ("test", 5)):
            path = folder / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(make(rng)) + "\n" for _ in range(rows)), encoding="utf-8")


def write_config(path: Path, stage: int, ulysses: int, ring: int, **words: Any) -> Path:
    automatic = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    section = {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "sequence_parallel": {"size": ulysses * ring, "ulysses_size": ulysses, "ring_size": ring, **words},
        **dict.fromkeys(automatic, "auto"),
    }
    path.write_text(json.dumps(section), encoding="utf-8")
    return path


def flags(options: dict[str, Any]) -> list[str]:
    return [
        text for key, value in options.items() for text in (f"--{key}", *map(str, value if isinstance(value, list) else [value]))
    ]


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(folder / "cache"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    save_model(folder / "model")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def logs(folder: Path, warm: Warm) -> dict[str, dict[str, Any]]:
    """Log histories: upstream or sharded -> run -> entries."""
    jobs: dict[str, dict[str, Any]] = {"upstream": {}, "sharded": {}}
    for name, (script, data, mesh, options) in RUNS.items():
        common = {"model_name_or_path": folder / "model", "dataset_name": folder / data, **COMMON, **options}
        config = write_config(folder / f"{name}.json", *mesh)
        jobs["upstream"][name] = [script, flags({**common, "output_dir": folder / "upstream" / name})]
        jobs["sharded"][name] = [script, flags({**common, "output_dir": folder / "sharded" / name, "deepspeed": config})]
    write_config(folder / "sum.json", 1, 2, 1, loss_reduction="sum")
    for name, (script, options, _) in REFUSED.items():
        text = {"reward": "pairs", "grpo_evaluated": "prompts"}.get(script, "text")
        config = folder / f"{options.get('deepspeed', 'sft_assistant_masks')}.json"
        common = {"model_name_or_path": folder / "model", "dataset_name": folder / text, **COMMON, **options}
        jobs["sharded"][name] = [script, flags({**common, "output_dir": folder / name, "deepspeed": config})]
    for kind, here in jobs.items():
        (folder / f"jobs_{kind}.json").write_text(json.dumps(here), encoding="utf-8")
    for kind, ranks, more in (("upstream", 0, ["--upstream"]), ("sharded", 2, [])):
        files = (folder / f"jobs_{kind}.json", folder / f"logs_{kind}.json")
        warm.run("tests.e2e.examples_job", *files, *more, folder=folder, ranks=ranks, timeout=TIMEOUT_S)
    return {kind: json.loads((folder / f"logs_{kind}.json").read_text(encoding="utf-8")) for kind in jobs}


def test_accelerate_launch_with_a_deepspeed_config(logs: dict[str, dict[str, Any]], folder: Path) -> None:
    """The script as it is, and the config by the launcher in the place of TrainingArguments(deepspeed=...)."""
    script, data, _, options = RUNS["sft_completions"]
    config, output = write_config(folder / "accelerate.json", 2, 1, 2), folder / "accelerate"
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--use_deepspeed", "--deepspeed_config_file"]
    launch += [
        str(config),
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--main_process_port",
        str(free_port()),
    ]
    options = {"model_name_or_path": folder / "model", "dataset_name": folder / data, "output_dir": output, **COMMON, **options}
    run([*launch, str(EXAMPLES / f"{script}.py"), *flags(options)], folder)
    history = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert_same([entry for entry in history if "train_runtime" not in entry], logs["upstream"]["sft_completions"][:-1])


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused_before_training(logs: dict[str, dict[str, Any]], name: str) -> None:
    assert isinstance(logs["sharded"][name], str), "it has trained"
    assert logs["sharded"][name].startswith(REFUSED[name][2])


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_diff_in_the_docs_is_that_of_the_scripts(name: str) -> None:
    before, after = (
        (folder / f"{name}.py").read_text(encoding="utf-8").splitlines() for folder in (EXAMPLES / "upstream", EXAMPLES)
    )
    names = (f"scripts/examples/upstream/{name}.py", f"scripts/examples/{name}.py")
    wanted = list(difflib.unified_diff(before, after, *names, n=1, lineterm=""))
    text = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
    assert f"```diff\n{chr(10).join(wanted)}\n```" in text
    new = [line[1:] for line in wanted[2:] if line[0] == "+" and line[1:].strip()]
    gone = [line for line in wanted[2:] if line[0] == "-"]
    assert len(gone) < len(new) <= 2, "what is imported from trl, and the trainer from ds_cp.trl"


def compared(entry: dict[str, Any]) -> dict[str, Any]:
    """Without what TRL does not log: the figures of ds_cp's meter (tests/dist/test_stats.py)."""
    return {k: v for k, v in entry.items() if k not in train_plot.FIGURES and not any(clock in k for clock in CLOCKS)}


def assert_same(got: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert len([entry for entry in wanted if "loss" in entry]) == STEPS
    for ours, theirs in zip(got, wanted, strict=True):
        ours, theirs = compared(ours), compared(theirs)
        if abs(theirs.get("rewards/margins", 1.0)) + abs(ours.get("rewards/margins", 1.0)) < NO_MARGIN:
            del ours["rewards/accuracies"], theirs["rewards/accuracies"]
        for key in RARE:
            if key not in ours:
                theirs.pop(key, None)
        assert ours == pytest.approx(theirs, rel=TOLERANCE, abs=TOLERANCE), f"step {theirs.get('step')}"


@pytest.mark.parametrize("name", RUNS)
def test_losses_and_metrics_are_those_of_upstream_in_one_process(logs: dict[str, dict[str, Any]], name: str) -> None:
    assert_same(logs["sharded"][name], logs["upstream"][name])
    losses = [entry["loss"] for entry in logs["sharded"][name] if "loss" in entry]
    assert len(set(losses)) == STEPS, "nothing is trained"

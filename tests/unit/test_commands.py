"""Every command of the docs is run by a test: by this one, where it starts nothing, or by one named here; or it says why not.

A command that no rule knows fails with its page and line. "Run" is of the same program on a tiny model; its options are looked for
in the test's file.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from ds_cp import cli, comm, selftest
from tests.unit.docs_commands import ROOT, Command, commands

COMMANDS = commands()


@dataclass(frozen=True)
class Here:
    """`ds-cp` itself, in this process."""


@dataclass(frozen=True)
class Script:
    """A script of one process, run here with these options, which are its own made small."""

    options: tuple[str, ...] = ()
    look: Callable[[str], object] = str.strip
    """At what it has printed, in the folder in which it has written."""


@dataclass(frozen=True)
class Run:
    """Run by `test` (file::function)."""

    test: str
    how: str = ""
    """What is not as the reader types it."""
    unlike: dict[str, str] = field(default_factory=dict)
    """Options that the test does not use, and why."""
    options: bool = False
    """Whether every other option must stand in the test's file."""


@dataclass(frozen=True)
class Not:
    """Run by no test."""

    why: str


TRAIN = "tests/e2e/test_train_script.py::test_two_ranks_give_the_curve_of_one_process"
SIZES = "sizes of a model that is drawn: TestModel of the same file"
LENGTH = "how long and how fast it trains"
UNLIKE = {"bf16": "CPU ranks have --use_cpu in its place", "hostfile": "tests/hosts starts over several hosts"}
UNLIKE |= {"num_gpus": "--num_accelerators is the same of the launcher"}
CURVES = dict.fromkeys(("lr_scheduler_type", "learning_rate", "warmup_steps", "save_strategy"), LENGTH)
CURVES |= {
    "logging_steps": "how often it logs",
    "model_type": SIZES,
    "config_overrides": SIZES,
    "name": "a title",
    "seed": "the default is another number",
}
HOSTS = "tests/hosts/test_hosts.py"
BENCH = "tests/e2e/test_benchmarks.py"
TINY_CPU = "--tiny, on CPU"
CPU = "--tiny, on CPU; by tests/gpu/test_benchmarks_gpu.py where there is a GPU"
TINY = ("--tiny", "--device", "cpu")
QUICK = ("--quick", "--no-peers", "--seconds", "0", "--packed-kinds", "half", "--packed-layouts", "balanced", "--rows", "1")


def looks_like_the_towers_of_the_docs(_: str) -> bool:
    """Who holds which images is the same for a tower of any size."""
    published, found = (json.loads(Path(path).read_text())["rows"] for path in (ROOT / "docs/data/tower.json", "tower.json"))
    shares = [{name: (row["patches"], row["share_of_patches"]) for name, row in rows.items()} for rows in (published, found)]
    return shares[0] == shares[1]


def drawn(png: str) -> bool:
    return Path(png).read_bytes().startswith(b"\x89PNG")


def looks_like_two_points(said: str) -> bool:
    """Of a curve, printed and drawn; both fit the GPU."""
    points = re.findall(r"^ *([\d,]+) tokens +([\d,]+) GPUs: +(\d+) tokens/s .* ([\d.]+) GiB$", said, re.MULTILINE)
    fits = all(int(speed) > 0 and 0 < float(memory) < 80 for *_, speed, memory in points)
    return drawn("curves.png") and fits and [point[:2] for point in points] == [("131,072", "8"), ("131,072", "16")]


RULES: dict[str, Here | Script | Run | Not] = {
    r"ds-cp (check|plan|explain) ": Here(),
    r"deepspeed .*--module ds_cp\.cli selftest ": Run(
        f"{HOSTS}::test_the_selftest_passes_over_a_hostfile", how="over two hosts of one rank"
    ),
    r"deepspeed .*scripts/train\.py .*--data shapes": Run(
        "tests/e2e/test_train_images.py::test_two_ranks_give_the_curve_of_one_process",
        how="with sizes of its own, ranks without the launcher",
    ),
    r"deepspeed .*--launcher openmpi scripts/train\.py": Run(
        f"{HOSTS}::test_every_launcher_gives_the_gradients_of_one_process", how="tests/hosts/parity_job.py as the program"
    ),
    r"deepspeed (--\w+ \S+ )*scripts/train\.py": Run(TRAIN, unlike=UNLIKE | CURVES, options=True),
    r"deepspeed train\.py --deepspeed ds_config\.json": Not("a program of the reader's"),
    r"deepspeed scripts/examples/sft\.py": Run(
        "tests/e2e/test_examples.py::test_losses_and_metrics_are_those_of_upstream_in_one_process",
        how="in ranks without the launcher; accelerate's starts it as it is",
        options=True,
    ),
    r"accelerate launch .*scripts/examples/sft\.py": Run(
        "tests/e2e/test_examples.py::test_accelerate_launch_with_a_deepspeed_config", options=True
    ),
    r"mpirun .*scripts/train\.py": Run(
        f"{HOSTS}::test_every_launcher_gives_the_gradients_of_one_process", how="tests/hosts/parity_job.py as the program"
    ),
    r"(sudo )?scripts/hosts run ": Run(
        f"{HOSTS}::test_every_launcher_gives_the_gradients_of_one_process", how="tests/hosts/parity_job.py as the program"
    ),
    r"(sudo )?scripts/hosts (up|down)": Run(f"{HOSTS}::test_every_launcher_gives_the_gradients_of_one_process"),
    r"(sudo )?scripts/hosts cut": Run(f"{HOSTS}::test_a_host_that_is_cut_off_for_five_seconds_goes_on"),
    r"(sudo )?scripts/hosts (sent|shape)": Run(f"{HOSTS}::test_a_link_is_shaped_and_its_bytes_are_counted"),
    r"(sudo )?scripts/hosts install": Not("CI itself calls it (.ci/run)"),
    r"scripts/quickstart( --install-only)?$": Not("CI itself installs by it; the two runs after that are scripts/train.py's"),
    r"scripts/test( |$)": Not("CI itself calls it (.ci/run)"),
    r"source \.venv/bin/activate$": Not("scripts/test does it"),
    r"export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1$": Not("scripts/test does it"),
    r"python scripts/train\.py --help$": Run("tests/unit/test_docs.py::test_a_command_of_the_docs_is_taken", how="its parser"),
    r"python scripts/gen_config_docs\.py": Run("tests/unit/test_config.py::test_docs_config_md_is_what_the_code_says"),
    r"python scripts/gen_figures\.py": Run("tests/unit/test_figures.py::test_a_figure_is_what_the_code_draws"),
    r"python scripts/gen_recipes\.py": Run(
        "tests/unit/test_planner.py::test_recipes_are_what_the_planner_writes_and_pass_the_check"
    ),
    r"python scripts/models_map\.py": Run(
        "tests/dist/test_models_map.py::test_the_page_says_what_comes_out", how="25 of its types"
    ),
    r"python scripts/bench/planner_check\.py": Run("tests/unit/test_planner.py::test_predictions_hold_where_the_docs_say_so"),
    r"python scripts/bench/memory\.py --plot": Script(
        ("--plot", f"{ROOT}/docs/data/h200_memory_longest.json", "--png", "memory.png"), lambda _: drawn("memory.png")
    ),
    r"python scripts/bench/planner_memory\.py": Run(f"{BENCH}::test_memory_is_counted", how="one case"),
    r"python scripts/bench/(one_rank|memory)\.py (?!--loss)": Run(f"{BENCH}::test_a_benchmark_of_one_rank_runs", how=TINY_CPU),
    r"python scripts/bench/memory\.py --loss": Run(f"{BENCH}::test_the_loss_alone", how=CPU),
    r"python scripts/bench/real_ranks\.py": Run(f"{BENCH}::test_real_ranks_of_two", how=CPU),
    r"python scripts/bench/offload_trace\.py": Run(f"{BENCH}::test_a_step_with_and_without_offloaded_activations", how=CPU),
    r"python scripts/bench/liger\.py": Run(
        "tests/gpu/test_benchmarks_gpu.py::test_ligers_gradients_are_as_near_to_fp64_as_those_of_whole_logits",
        how="only where there is a GPU: Liger has no kernels for CPU",
    ),
    r"pip install -e \.$": Not("scripts/quickstart does it, which CI itself calls"),
    r"pip install ": Not("it fetches packages that are optional"),
    r"torchrun .* pretrain_gpt\.py": Not("Megatron-LM's, beside what takes its place here"),
    r"python -m pytest tests/gpu": Not("it is tests, skipped where there is no GPU"),
    r"python scripts/bench/planning\.py": Script(("--tokens", "4096", "--documents", "16", "--ring", "4", "--runs", "1")),
    r"python scripts/bench/balance\.py": Script(("--out", "balance.json")),
    r"python scripts/bench/attention\.py --read": Script(
        ("--read", f"{ROOT}/docs/data/h200_attention.json", "--png", "attention.png"), lambda _: drawn("attention.png")
    ),
    r"python scripts/bench/delta\.py --read": Script(("--read", f"{ROOT}/docs/data/h200_delta_heads.json")),
    r"python scripts/bench/attention\.py": Script(
        (*TINY, *QUICK, "--kernels", "reference", "--sections", "speed", "packed", "--lengths", "128", "--ring", "2")
    ),
    r"python scripts/bench/delta\.py": Script((*TINY, "--ranks", "2", "--contenders", "heads", "state", "--profile")),
    r"python scripts/bench/tower\.py": Script(("--tiny", "--json", "tower.json"), looks_like_the_towers_of_the_docs),
    r"python scripts/bench/planner_curves\.py": Script(
        ("--png", "curves.png", "--lengths", "131072", "--gpus", "8", "16"), looks_like_two_points
    ),
    r"python scripts/bench/parity\.py": Run("tests/dist/test_benchmarks.py::test_a_case_of_each_table", how="one case"),
    r"python scripts/bench/deepspeed_tiles\.py": Run(
        "tests/dist/test_benchmarks.py::test_tiles_of_deepspeed_that_are_right_and_some_that_are_not", how="two of the ways"
    ),
    r"python scripts/bench/alst\.py": Run(f"{BENCH}::test_alst_and_ours", how="short rows"),
    r"sudo \.venv/bin/python scripts/bench/link\.py": Run(f"{BENCH}::test_a_step_over_a_shaped_link", how="a short row"),
    r"python scripts/soak/kill\.py": Run(f"{BENCH}::test_a_run_with_a_killed_rank_ends_as_one_that_was_left_alone", how="one kill"),
    r"python scripts/soak/memory\.py": Run(f"{BENCH}::test_files_and_memory_of_a_long_run_are_counted", how="30 steps"),
    r"python -m deepspeed\.checkpoint\.ds_to_universal": Run(
        "tests/dist/test_loader.py::test_another_number_of_ranks_goes_on_with_the_curve", how="its main(), with the same arguments"
    ),
}


def rule_of(command: Command) -> Here | Script | Run | Not:
    return next((rule for pattern, rule in RULES.items() if re.match(pattern, str(command))), Not(""))


def test_every_command_has_a_rule() -> None:
    unknown = [f"{command.place}: {command}" for command in COMMANDS if rule_of(command) == Not("")]
    assert unknown == [], "no test runs it: name one in RULES of this file, or the reason"


def test_a_file_that_is_typed_as_a_program_is_one() -> None:
    typed = [(command, next(word for word in command.words if word != "sudo")) for command in COMMANDS]
    files = [(command, ROOT / word) for command, word in typed if "/" in word and not word.startswith(".venv")]
    assert files
    assert [f"{command.place}: {command}" for command, file in files if not os.access(file, os.X_OK)] == []


def test_every_rule_has_a_command() -> None:
    assert [pattern for pattern in RULES if not any(re.match(pattern, str(command)) for command in COMMANDS)] == []


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if isinstance(rule, Run)], ids=lambda rule: rule.test)
def test_a_test_that_is_named_is_there(rule: Run) -> None:
    path, _, name = rule.test.partition("::")
    assert re.search(rf"^\s*def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), rule.test


def test_the_options_of_a_command_are_those_that_its_test_uses() -> None:
    missing = []
    for command in COMMANDS:
        rule = rule_of(command)
        if isinstance(rule, Run) and rule.options:
            text = (ROOT / rule.test.partition("::")[0]).read_text(encoding="utf-8")
            used = {option for option in command.options if re.search(rf'"(--)?{option}"|\b{option}=', text)}
            missing += [f"{command.place}: --{option}" for option in command.options - used - rule.unlike.keys()]
    assert missing == []


class Shell:
    """A folder with what the commands name, in which they are run one after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        selftest.tiny_model("llama").config.save_pretrained(folder / "my_model")
        (folder / "ds_configs").symlink_to(ROOT / "ds_configs")
        (folder / "lengths.txt").write_text("3000 500 96 500", encoding="utf-8")
        (folder / "ds_config.json").write_text(json.dumps({"sequence_parallel": {"size": "auto"}}), encoding="utf-8")

    def run(self, command: Command) -> str:
        words = [self._here(before, word) for before, word in zip(command.words, command.words[1:], strict=False)]
        done = CliRunner().invoke(cli.app, words)
        assert done.exit_code == 0, f"{command.place}: {command}\n{done.output}"
        return done.output

    def _here(self, before: str, word: str) -> str:
        is_model = before in ("plan", "--model")
        return "my_model" if is_model else word


OURS = [command for command in COMMANDS if isinstance(rule_of(command), Here)]


@pytest.mark.parametrize("page", sorted({command.page for command in OURS}))
def test_the_shells_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shell = Shell(tmp_path)
    for command in (command for command in OURS if command.page == page):
        shown = shell.run(command)
        assert shown.strip(), command
        if "--write" in command.words:
            written = json.loads((tmp_path / "ds_config.json").read_text(encoding="utf-8"))
            assert written["sequence_parallel"]["size"] != "auto", command


@pytest.mark.parametrize("pattern", [pattern for pattern, rule in RULES.items() if isinstance(rule, Script)])
def test_a_script_of_one_process_runs(pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    rule, told = RULES[pattern], [command for command in COMMANDS if re.match(pattern, str(command))]
    for command in (command for command in told if command.page.endswith(".md")):  # a script's own examples have all its options
        assert command.options <= {word[2:] for word in rule.options if word.startswith("--")}, command.place
    script = ROOT / told[0].words[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), *rule.options])
    monkeypatch.syspath_prepend(script.parent)
    for name in ("Hop", "Gather", "reduce_scatter"):  # one of the scripts puts others in their place
        monkeypatch.setattr(comm, name, getattr(comm, name))
    runpy.run_path(str(script), run_name="__main__")
    assert rule.look(capsys.readouterr().out)


def test_the_options_of_a_measurement_are_those_that_it_takes(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    named = re.compile(r"scripts/(bench|soak)/\w+\.py")
    measured = [(command, word) for command in COMMANDS for word in command.words if named.match(word)]
    shown = {}
    for script in sorted({script for _, script in measured}):
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        monkeypatch.syspath_prepend((ROOT / script).parent)
        with patch.dict(os.environ), pytest.raises(SystemExit, match=r"^0$"):  # some of them set variables
            runpy.run_path(str(ROOT / script), run_name="__main__")
        shown[script] = capsys.readouterr().out
    asked = [(f"{command.place}: --{option}", script) for command, script in measured for option in command.options]
    assert [what for what, script in asked if not re.search(rf"{what.split()[1]}[\s,\]]", shown[script])] == []

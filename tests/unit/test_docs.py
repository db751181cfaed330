"""What the docs tell a reader to type is something that the programs take: links, JSON, Python, `ds-cp` and scripts' arguments."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path

import pytest
import typer
from transformers import HfArgumentParser

import ds_cp
from ds_cp import cli, config
from tests.unit.docs_commands import HISTORY, PAGES, ROOT, Command, commands

KNOWN = ("scripts/quickstart", "scripts/test", "sudo", "accelerate", "source", "python", "export", "torchrun")
"""Commands that other tests and CI start (tests/unit/test_commands.py); here only their files are looked for."""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


COMMANDS = [command for command in commands() if not command.inline or command.words[0] == "ds-cp"]


def ds_cp_takes(words: list[str]) -> None:
    """Parses as the shell does; nothing is started. Files need not be there."""
    group = typer.main.get_command(cli.app)
    group.commands[words[0]].make_context(words[0], words[1:])


def train_takes(words: list[str]) -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from scripts import train
    finally:
        sys.path.pop(0)
    parser = HfArgumentParser((train.ModelArguments, train.DataArguments, train.TrainArguments))
    _, unknown = parser.parse_known_args(words)
    assert unknown == []


def accepted(words: list[str]) -> None:
    """Fails for a command that nothing here knows."""
    if words[0] == "ds-cp":
        return ds_cp_takes(words[1:])
    if words[0] == "deepspeed" and "ds_cp.cli" in words:
        return ds_cp_takes(words[words.index("ds_cp.cli") + 1 :])
    scripts = [word for word in words if word.startswith("scripts/")]
    assert all((ROOT / word).exists() for word in scripts), f"no such file among {scripts}"
    if words[0] == "deepspeed" and "scripts/train.py" in words:
        return train_takes(words[words.index("scripts/train.py") + 1 :])
    assert words[0] in KNOWN or words[:2] in (["deepspeed", "train.py"], ["deepspeed", "scripts/examples/sft.py"]), words
    return None


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.place}: {command}"[:80])
def test_a_command_of_the_docs_is_taken(command: Command) -> None:
    accepted(list(command.words))


@pytest.mark.parametrize(
    "text",
    [
        "rm -rf runs",
        "ds-cp plan my_model --gpus 8 --lenght 4",
        "deepspeed scripts/train.py --model m --seq_len_typo 3",
        "python scripts/no.py",
    ],
)
def test_a_command_that_is_wrong_is_seen(text: str) -> None:
    usage = typer.BadParameter.__base__  # of any wrong option; typer may bring its own click
    with pytest.raises((AssertionError, usage)):
        accepted(shlex.split(text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_resolve(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    files = {target.partition("#")[0] for target in targets if "://" not in target} - {""}
    assert {target for target in files if not (page.parent / target).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_compiles_and_names_of_the_package_exist(page: Path) -> None:
    programs = ["\n".join(line[1:] for line in b.splitlines() if line[:1] != "-") for b in blocks(page, "diff") if "@@" not in b]
    for block in blocks(page, "python") + programs:
        used = {
            node.attr
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "ds_cp"
        }
        assert used <= set(ds_cp.__all__)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_shipped_configs_are_legal(path: Path) -> None:
    config.parse(json.loads(path.read_text(encoding="utf-8")))


def test_figures_of_numerics_are_those_of_the_data() -> None:
    text = (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
    rows = re.findall(r"\((data/parity\w*\.json)\), (\d+) cases\).*\| 1e-5 \| (\S+) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for path, cases, worst in rows:
        found = json.loads((ROOT / "docs" / path).read_text(encoding="utf-8"))["rows"]
        assert (int(cases), worst) == (len(found), f"{max(row['gradient'] for row in found):.1e}"), path
        assert max(row["loss"] for row in found) < 3e-7, path


def literals() -> list[str]:
    """Every string of the package but docstrings, with ... where it fills in a value."""
    found = []
    for path in sorted((ROOT / "ds_cp").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def messages(page: str) -> list[str]:
    """Lines of text blocks, and code with a blank in the first column of tables."""
    path = ROOT / "docs" / page
    lines = [line for block in blocks(path, "text") for line in block.splitlines()]
    cells = re.findall(r"^\| ([^|]*) \|", path.read_text(encoding="utf-8"), re.MULTILINE)
    return lines + [code for cell in cells for code in re.findall(r"`([^`]+)`", cell) if " " in code]


def said(message: str, sources: list[str]) -> bool:
    parts = [re.escape(part.strip()) for part in message.split("...")]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return max(map(len, parts)) >= 10 and any(pattern.search(source) for source in sources)


@pytest.mark.parametrize(("page", "least"), [("troubleshooting.md", 25), ("numerics.md", 1)])
def test_messages_that_a_page_quotes_are_said_by_the_code(page: str, least: int) -> None:
    found, sources = messages(page), literals()
    assert len(found) >= least
    assert [message for message in found if not said(message, sources)] == []
    assert not said("torch extension: ... was left by a process that fell asleep", sources)


def test_the_index_has_every_page() -> None:
    linked = set(re.findall(r"\]\((\w+\.md)", (ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} == linked


def test_migration_was_read_in_the_versions_that_are_installed() -> None:
    """With another version the lines that the page tells of have to be read again."""
    text = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    for name in ("DeepSpeed", "accelerate", "transformers"):
        read = set(re.findall(rf"\b{name} (\d+\.\d+\.\d+)", text))
        assert read == {metadata.version(name.lower())}, name


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != HISTORY], ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    code = re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
    named = {path for words in code for path in re.findall(r"(?<![\w/])(?:ds_cp|tests|scripts|ds_configs)/[\w/]+\.\w+", words)}
    mine = {path for path in named if "NAME" not in path}  # what a reader adds
    assert {path for path in mine if not (ROOT / path).exists()} == set()
    tests = {found for words in code for found in re.findall(r"(tests/[\w/]+\.py)::(\w+)", words)}
    assert {found for found in tests if f"def {found[1]}(" not in (ROOT / found[0]).read_text(encoding="utf-8")} == set()


def ranges_of_docs() -> set[str]:
    """Names of ranges in a trace, in the table of docs/observability.md; tests/dist/test_stats.py looks for them in traces."""
    text = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`(?:ds_cp |ProfilerStep).*?) \|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def ranges_of_code() -> set[str]:
    """Patterns of the names that the package gives ranges; what one of a collective or hop is filled in with is an argument."""
    fixed = {re.escape(text).replace(r"\.\.\.", ".+") for text in literals() if re.match(r"ds_cp (?!watch)\S", text)}
    words = {
        word for path in (ROOT / "ds_cp").rglob("*.py") for word in words_of_ranges(ast.parse(path.read_text(encoding="utf-8")))
    }
    return fixed | {f"ds_cp {re.escape(word)} (hop: wait|\\(.+\\))" for word in words - {"selftest"}}


def words_of_ranges(tree: ast.Module) -> set[str]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    ours = [call for call in calls if ast.unparse(call.func).rpartition(".")[2] in ("_named", "exchange", "post", "Hop")]
    return {arg.value for call in ours for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}


def test_every_range_of_the_code_is_in_the_docs() -> None:
    listed, patterns = ranges_of_docs(), ranges_of_code()
    assert len(patterns) > 12
    assert [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in listed)] == []

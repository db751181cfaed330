"""The commands that the docs tell a reader to type, each with the page and the line on which it stands.

In blocks of a shell every statement is one; in other blocks, in indented code, in `code` of the text and in the docstrings of
scripts and of `ds-cp` (which `--help` shows in part) a line that begins with a program.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
HISTORY = "CHANGELOG.md"
"""Says what there was; only its links are checked."""
SOURCES = sorted([*(ROOT / "scripts").rglob("*.py"), ROOT / "scripts" / "hosts", ROOT / "ds_cp" / "cli.py"])
PROGRAMS = r"(?:[A-Z_]+=\S+ )*(?:python3?|pip|pytest|torchrun|ds-cp|deepspeed|mpirun|accelerate|sudo|scripts/\S+)"
BLOCK = re.compile(r"^[ \t]*(```|~~~)(\w*)\n(.*?)^[ \t]*\1", re.MULTILINE | re.DOTALL)
SHELLS = ("bash", "sh", "shell")
TYPED = re.compile(rf"^[ \t]*[$+]?[ \t]*({PROGRAMS} .*)$")
"""A line that is a command, after a prompt or as a diff's new line."""
INDENTED = re.compile(rf"^(?: {{4,}}|\t)\$? ?({PROGRAMS} .*)$")
INLINE = re.compile(r"`([^`\n]+)`")
NAMES = ("ds-cp", "pip")
"""Programs of which `program word` is a name: `ds-cp plan`."""


@dataclass(frozen=True)
class Command:
    """`words` as the shell sees them, without variables that are set for it; those that its block sets are filled in."""

    page: str
    line: int
    words: tuple[str, ...]
    inline: bool = False

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def options(self) -> set[str]:
        return {word[2:].partition("=")[0] for word in self.words if word.startswith("--")}

    def __str__(self) -> str:
        return " ".join(self.words)


def commands() -> list[Command]:
    pages = [command for page in PAGES if page.name != HISTORY for command in _of_page(page)]
    return pages + [command for source in SOURCES for command in _of_source(source)]


def _of_page(page: Path) -> Iterator[Command]:
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        variables: dict[str, str] = {}
        shell = block[2] in SHELLS
        for line, statement in _statements(block[3], _line(text, block.start(3)), quotes=shell):
            typed = statement if shell else _typed(TYPED, statement)
            words = _words(typed, variables)
            if words:
                yield Command(page.name, line, words)
    prose = BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text)
    for line, statement in _statements(prose, 1):
        if words := _words(_typed(INDENTED, statement), {}):
            yield Command(page.name, line, words)
    for found in INLINE.finditer(prose):
        if re.match(f"{PROGRAMS} ", found[1]):
            words = _words(found[1].removesuffix(" ..."), {})
            if words[0] not in NAMES or len(words) > 2:
                yield Command(page.name, _line(prose, found.start()), words, inline=True)


def _of_source(source: Path) -> Iterator[Command]:
    """Lines of its docstrings; ruff takes their indentation away where there is no other text."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node, clean=False)):
            for line, statement in _statements(text, node.body[0].lineno):
                if words := _words(_typed(TYPED, statement), {}):
                    yield Command(str(source.relative_to(ROOT)), line, words, inline=True)


def _typed(pattern: re.Pattern[str], statement: str) -> str:
    found = pattern.match(statement)
    return found[1] if found else ""


def _line(text: str, start: int) -> int:
    return text.count("\n", 0, start) + 1


def _statements(block: str, first: int, quotes: bool = False) -> Iterator[tuple[int, str]]:
    """(line, text) of each: lines that a backslash or, with `quotes`, an open quote joins are one."""
    start, held = first, ""
    for number, line in enumerate(block.splitlines(), first):
        start = start if held else number
        held = f"{held}\n{line}" if held else line
        if not line.endswith("\\") and (not quotes or held.count('"') % 2 == 0):
            yield start, re.sub(r"\\\n\s*", "", held)
            held = ""


def _words(text: str, variables: dict[str, str]) -> tuple[str, ...]:
    for name, value in variables.items():
        text = text.replace(f"${name}", value)
    words = shlex.split(text, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0], re.DOTALL):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    return tuple(words)

"""The commands that the docs tell a reader to type, each with the page and the line on which it stands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
HISTORY = "CHANGELOG.md"
"""Says what there was; only its links are checked."""
PROGRAMS = r"(?:FLA_\w+=\S+ )?(?:python|ds-cp|deepspeed|mpirun|accelerate|sudo|scripts/\S+)"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")


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
    return [command for page in PAGES if page.name != HISTORY for command in _of_page(page)]


def _of_page(page: Path) -> Iterator[Command]:
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        variables: dict[str, str] = {}
        for line, statement in _statements(block[2], _line(text, block.start(2))) if block[1] == "bash" else ():
            words = _words(statement, variables)
            if words:
                yield Command(page.name, line, words)
    prose = BLOCK.sub(lambda block: "\n" * block[0].count("\n"), text)
    for found in INLINE.finditer(prose):
        if re.match(f"{PROGRAMS} ", found[1]):
            words = _words(found[1].removesuffix(" ..."), {})
            if words[0] != "ds-cp" or len(words) > 2:  # `ds-cp plan` is a name
                yield Command(page.name, _line(prose, found.start()), words, inline=True)


def _line(text: str, start: int) -> int:
    return text.count("\n", 0, start) + 1


def _statements(block: str, first: int) -> Iterator[tuple[int, str]]:
    """(line, text) of each: lines that a backslash or an open quote joins are one."""
    start, held = first, ""
    for number, line in enumerate(block.splitlines(), first):
        start = start if held else number
        held = f"{held}\n{line}" if held else line
        if not line.endswith("\\") and held.count('"') % 2 == 0:
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

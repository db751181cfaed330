"""Writes docs/config.md from the fields of `ds_cp.config.Config`; `--check` only compares, for CI.

python scripts/gen_config_docs.py
python scripts/gen_config_docs.py --check
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ds_cp.config import BLOCK, Config, Profile  # noqa: E402 (the package beside this script, installed or not)

TARGET = ROOT / "docs" / "config.md"

INTRO = f"""\
# The `{BLOCK}` block

Generated from `ds_cp/config.py` by `python scripts/gen_config_docs.py`; a test compares the two. Edit the docstrings there.

The block stands in ds_config.json beside everything that DeepSpeed documents. Every key is optional, and a config without the
block has `"size": 1`, which is off. An unknown key or a value that is not listed here is refused before any parameter is
allocated. `"auto"` is resolved once at start-up and printed.

| key | values | default | meaning |
| --- | --- | --- | --- |
"""

OBJECT = """
`profile` as an object:

| key | values | default | meaning |
| --- | --- | --- | --- |
"""


def main() -> int:
    text = render()
    if "--check" not in sys.argv[1:]:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(text, encoding="utf-8")
        return 0
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    print(f"{TARGET.relative_to(ROOT)} differs from ds_cp/config.py; run python scripts/gen_config_docs.py")
    return 1


def render() -> str:
    """The whole of docs/config.md."""
    return INTRO + _rows(Config) + OBJECT + _rows(Profile)


def _rows(model: type[BaseModel]) -> str:
    return "".join(_row(model, name) for name in model.model_fields)


def _row(model: type[BaseModel], name: str) -> str:
    field = model.model_fields[name]
    meaning = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{name}` | {', '.join(_values(model, name))} | {_code(field.default)} | {meaning} |\n"


def _values(model: type[BaseModel], name: str) -> list[str]:
    """What the model accepts for a field, from its JSON schema."""
    schema = model.model_json_schema()["properties"][name]
    values: list[str] = []
    for option in schema.get("anyOf", [schema]):
        if "enum" in option:
            values += map(_code, option["enum"])
        elif "const" in option:
            values.append(_code(option["const"]))
        elif "$ref" in option:
            values.append("an object")
        elif option["type"] == "boolean":
            values += map(_code, (True, False))
        else:
            values.append(f"{option['type']} >= {option['minimum']}" if "minimum" in option else option["type"])
    return values


def _code(value: Any) -> str:
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    sys.exit(main())

"""Writes ds_configs/h100_*.json and the table of docs/recipes.md by `ds-cp plan`; `--check` only compares, for CI.

python scripts/gen_recipes.py
python scripts/gen_recipes.py --check
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402  (the path comes first)
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402  (as above)

from ds_cp.planner import machine, read, render, search  # noqa: E402 (the package beside this script, installed or not)

DOCS = ROOT / "docs" / "recipes.md"
MARK = "<!-- what follows is written by scripts/gen_recipes.py -->"


@dataclass(frozen=True)
class Recipe:
    """A model on machines, and the length that it is planned for."""

    file: str
    model: str
    config: dict[str, Any]
    hosts: int
    tokens: int


LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
RECIPES = (
    Recipe("h100_1x8.json", "Llama-3.1-8B", LLAMA_8B, 1, 262_144),
    Recipe("h100_4x8.json", "Llama-3.1-8B", LLAMA_8B, 4, 1_048_576),
    Recipe("h100_32x8.json", "Llama-3.1-70B", LLAMA_70B, 32, 1_048_576),
)


def llama(recipe: Recipe) -> LlamaConfig:
    return LlamaConfig(**recipe.config, num_key_value_heads=8, vocab_size=128256)


def planned(recipe: Recipe) -> search.Plan:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama(recipe))
    where = machine.build(8 * recipe.hosts, 8, "h100", 0, "nvlink", "infiniband-400g", 1800)
    return search.plan(read.of(model, recipe.model), where, (0, recipe.tokens))


def texts() -> dict[Path, str]:
    """What every file must hold."""
    found, lines = {}, []
    for recipe in RECIPES:
        row = planned(recipe).rows[0]
        config = json.dumps(render.ds_config(row.choice), indent=2) + "\n"
        found[ROOT / "ds_configs" / recipe.file] = config
        degrees = row.choice.degrees
        sizes = f"{degrees.ulysses} x {degrees.ring} x {degrees.data}"
        cells = [f"[{recipe.file}](../ds_configs/{recipe.file})", f"{recipe.hosts} x 8 H100", recipe.model, f"{recipe.tokens:,}"]
        cells += [sizes, render.zero(row.choice), render.settings(row.choice)]
        cells += [f"{row.memory.peak / machine.GIB:.0f}", f"{row.times.seconds:.3g}", f"{row.tokens_per_second:,.0f}", row.reason]
        lines.append("| " + " | ".join(cells) + " |")
    columns = ("config", "GPUs", "model", "tokens a row", "ulysses x ring x data", "ZeRO", "settings", "GiB", "s a step")
    columns += ("tokens/s a GPU", "because")
    head = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    before = DOCS.read_text(encoding="utf-8").split(MARK)[0] if DOCS.is_file() else ""
    return found | {DOCS: before + MARK + "\n\n" + "\n".join([*head, *lines]) + "\n"}


def main() -> int:
    wrong = [path for path, text in texts().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        print(*(f"{path.relative_to(ROOT)} is not what scripts/gen_recipes.py writes" for path in wrong), sep="\n")
        return int(bool(wrong))
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A sample of docs/models.md on every run: what it says of an architecture is what comes out. All of them: scripts/models_map.py.

Chosen so that each kind of attention, position, expert and refusal is there once, among types that no other test runs sharded.
"""

from __future__ import annotations

import pytest

from ds_cp import selftest
from scripts import models_map

SAMPLE = (
    *("gpt2", "opt", "bert", "diffllama", "bart", "fuyu", "gpt_bigcode"),  # learned positions, partial rotary, one key/value head
    # norms, scales, windows, latent attention
    *("glm4", "hrm_text", "gemma4_unified", "exaone4", "nanochat", "minicpm3", "modernbert-decoder"),
    # experts, sinks, heads by layer, chunks, an indexer
    *("qwen2_moe", "granitemoe_swa", "laguna", "llama4_text", "mimo_v2_flash", "deepseek_v32"),
    *("falcon", "doge", "mamba", "inkling_text", "deepseek_v4"),  # refused
)


@pytest.fixture(scope="module")
def page() -> dict[str, models_map.Found]:
    return models_map.read(models_map.PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("model_type", SAMPLE)
def test_the_page_says_what_comes_out(pool, page: dict[str, models_map.Found], model_type: str) -> None:
    for state, said, through in pool(2).run(models_map.outcome, model_type=model_type):
        assert state == page[model_type][0], said
        assert through is page[model_type][2]
        if state == "refused":
            assert said == page[model_type][1]


@pytest.mark.parametrize("model_type", ["hy_v4", "llama4_text", "marian"])  # chosen keys with sinks, chunks, positions of its own
def test_ulysses_and_ring_together(pool, model_type: str) -> None:
    for report in pool(4).run(models_map.report_of, model_type=model_type, ulysses=2, ring=2):
        assert report.worst[1] < selftest.BAR, report.worst
        assert report.loss_error < selftest.BAR

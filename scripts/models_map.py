"""docs/models.md: every causal language model of the installed transformers, sharded over two ranks against one process.

    python scripts/models_map.py
    python scripts/models_map.py --only llama,gpt2 --json map.json

For each architecture a tiny config is made (`ds_cp.models.twin`, or the family's own), and one optimizer step on two gloo ranks,
once with the all-to-all and once with the ring, is compared with transformers in one process, every parameter's gradient. What
comes out is `exact`, or `refused` with the sentence that a user would read. Anything else ends this script with an error.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import os
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
warnings.filterwarnings("ignore")

import torch  # noqa: E402  (the paths and the environment come first)
import transformers  # noqa: E402
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig, PreTrainedModel  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from ds_cp import selftest  # noqa: E402
from ds_cp.models import checks, family_of, trial  # noqa: E402
from ds_cp.models.twin import twin  # noqa: E402
from tests.dist.pool import Pool  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
HEADING = "## Every causal language model of transformers"
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
INTRODUCTION = f"""\
`python scripts/models_map.py` makes this section from the installed transformers, and fails if an architecture is different.

- exact: a tiny model of it on two ranks, as ulysses and as ring, a row of one document and a packed one: the loss and every
  parameter's gradient are within 1e-5 of transformers in one process, document by document, in fp32. Where transformers' own fp32
  gradient is further than 1e-6 from its fp64 (that of a bias of keys is zero but for rounding), within ten times that distance.
  The number is the worst.
- refused: ds_cp ends the run before training, with this reason.

Types that no family of ds_cp lists are tried before training on a tiny twin of the user's model ([how](architecture.md)), so what
is newer than this page is accepted or refused by what it does. Of models with other parts (vision, audio) the text alone is
compared here; where ds_cp does not list the type, pixels and sound are refused.

Through transformers' attention interface are those whose file names it (`{INTERFACE}`), or whose language model, which may be of
another file, has a layer that does; also where only some layers do, and where no model can be built. All are decoders: the class
that AutoModelForCausalLM takes for the type. It is of these that {{share:.1%}} are exact."""
SIDES = ("### Through the attention interface", "### Not through the attention interface")
COLUMNS = "| architecture | | worst error, or reason |\n| --- | --- | --- |"
STATES = ("exact", "refused", "different")
Found = tuple[str, str, bool]
"""State, what is said about it, through the interface."""
MESHES = {"ulysses": (2, 1), "ring": (1, 2)}

FILLED: Mapping[str, Mapping[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 500000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "topk_method": "group_limited_greedy"},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nanochat": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8, "head_dim": 128},
    "phimoe": {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "xmod": {"default_language": "en_XX"},
}
"""Values that a config's class leaves open, where no model can be built or a layer is left out without them."""


def config_of(model_type: str) -> PretrainedConfig:
    """The default config of a model type, as a decoder and without dropout in attention."""
    config = CONFIG_MAPPING[model_type](**FILLED.get(model_type, {}))
    if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        config.is_decoder = True
    wanted = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].config_class
    if not isinstance(config, wanted) and isinstance(config.get_text_config(), wanted):
        config = config.get_text_config()
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def outcome(model_type: str) -> tuple[str, str, bool]:
    """(state, what is to be said about it, whether it is through the interface) of one architecture, on the ranks of the pool."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    named = INTERFACE in inspect.getsource(sys.modules[kind.__module__])
    try:
        config = config_of(model_type)
    except Exception as error:
        return "refused", f"transformers builds no default config of it ({_short(error)})", named
    try:
        with torch.device("meta"):
            whole = kind(config)
    except Exception as error:
        return "refused", f"transformers cannot build it from its default config ({_short(error)})", named
    return *_compared(kind, config, whole), named or bool(checks.attention_modules(whole))


def _compared(kind: type[PreTrainedModel], config: PretrainedConfig, whole: PreTrainedModel) -> tuple[str, str]:
    try:
        checks.refuse(whole)
    except ValueError as error:
        return "refused", _reason(error)
    try:
        model = _tiny(kind, config)
    except Exception:
        return _refusal_of_whole(whole)
    try:
        trial.refuse(model)
    except ValueError as error:
        return "refused", _reason(error)
    worst = 0.0
    for name, degrees in MESHES.items():
        try:
            report = _report(kind, config, *degrees)
        except ValueError as error:
            return "refused", _reason(error)
        worst = max(worst, report.worst[1], report.loss_error)
        if not worst <= selftest.BAR:
            return "different", f"{name}: {report.worst[0]} is off by {report.worst[1]:.1e}, the loss by {report.loss_error:.1e}"
    return "exact", f"{worst:.1e}"


def report_of(model_type: str, ulysses: int, ring: int) -> selftest.Report:
    """The comparison alone, on as many ranks as the pool has."""
    return _report(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]], config_of(model_type), ulysses, ring)


def _report(kind: type[PreTrainedModel], config: PretrainedConfig, ulysses: int, ring: int) -> selftest.Report:
    block = {"size": ulysses * ring, "ulysses_size": ulysses, "ring_size": ring}
    with contextlib.redirect_stdout(io.StringIO()):
        return selftest.tried(_tiny(kind, config), block)


def _tiny(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    return twin(kind, config) if family_of(config) is None else selftest.tiny_model(config.model_type)


def _refusal_of_whole(whole: PreTrainedModel) -> tuple[str, str]:
    """Of a model of which no twin can be built: the package must say no to the whole one."""
    try:
        trial.refuse(whole)
    except ValueError as error:
        return "refused", _reason(error)
    return "different", "no twin of it can be built, and it was not refused"


def _reason(error: Exception) -> str:
    text = str(error)
    return _short(text.partition("sequence parallelism: ")[2].partition("; change the model or set")[0] or text)


def _short(error: Exception | str) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) < 300 else f"{text[:296]} ...").replace("|", "\\|")


def page(found: Mapping[str, Found]) -> str:
    """docs/models.md with its last section made anew."""
    sides = [{name: each for name, each in found.items() if each[2] is through} for through in (True, False)]
    share = sum(state == "exact" for state, *_ in sides[0].values()) / max(len(sides[0]), 1)
    tables = "".join(
        f"\n{heading}: {_count(side)}\n\n{COLUMNS}\n{_rows(side)}" for heading, side in zip(SIDES, sides, strict=True) if side
    )
    before = PAGE.read_text(encoding="utf-8").partition(HEADING)[0].rstrip()
    title = f"{HEADING} {transformers.__version__}: {_count(found)}"
    return f"{before}\n\n{title}\n\n{INTRODUCTION.format(share=share)}\n{tables}"


def _count(found: Mapping[str, Found]) -> str:
    return ", ".join(f"{sum(each == state for each, *_ in found.values())} {state}" for state in STATES)


def _rows(found: Mapping[str, Found]) -> str:
    return "".join(f"| {name} | {state} | {said} |\n" for name, (state, said, _) in found.items())


def read(text: str) -> dict[str, Found]:
    """What `page` wrote."""
    found: dict[str, Found] = {}
    for through, part in zip((True, False), text.partition(SIDES[0])[2].partition(SIDES[1])[::2], strict=True):
        rows = (line.strip("| \n").split(" | ", 2) for line in part.splitlines() if line.startswith("| ") and "---" not in line)
        found |= {row[0]: (row[1], row[2], through) for row in rows if len(row) == 3 and row[1] in STATES}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="model types, by commas; the other rows of docs/models.md stay as they are")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    before = read(PAGE.read_text(encoding="utf-8")) if arguments.only else {}
    pool, found, began = Pool(2), {}, time.time()
    for name in names:
        start = time.time()
        try:
            results = pool.run(outcome, model_type=name)
            found[name] = next((result for result in results if result[0] == "different"), results[0])
        except Exception as error:
            found[name] = "different", f"neither trained nor refused: {_short(str(error)[-250:])}", True
            pool.close()
            pool = Pool(2)
        print(f"{name}: {found[name][0]} ({found[name][1]}) {time.time() - start:.1f} s", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))
    pool.close()
    PAGE.write_text(page(dict(sorted({**before, **found}.items()))), encoding="utf-8")
    wrong = [name for name, (state, *_) in found.items() if state == "different"]
    print(f"{len(found)} architectures in {time.time() - began:.0f} s, different: {wrong or 'none'}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()

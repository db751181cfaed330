"""The parity table: worst relative error of any parameter's gradient, and of the loss, against one HF process (fp32, CPU ranks).

    python scripts/bench/parity.py --json docs/data/parity.json
    python scripts/bench/parity.py --quick --markdown
    python scripts/bench/parity.py --only "ulysses 1 x ring 2"    # cases with this in their names

The same jobs as the tests in tests/dist, on the same pool of gloo workers; a row's bar is 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

import torch  # noqa: E402  (the paths and the environment come first)
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from ds_cp import selftest  # noqa: E402
from tests.dist import jobs, pictures  # noqa: E402
from tests.dist.pool import Pool  # noqa: E402
from tests.dist.test_parity import MESHES, block, masked, packed, padded  # noqa: E402

MODELS = ("llama", "qwen3", "qwen2", "gpt_neox")
HYBRIDS = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "olmo_hybrid")
WINDOWED = ("mistral", "phi3", "gemma2", "gemma3_text", "cohere2", "olmo3")
EXPERTS = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "qwen3_5_moe_text", "deepseek_v3", "glm4_moe")
VISION = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
UNBALANCED = ("deepseek_v3", "glm4_moe")
BAR = 1e-5
Case = tuple[str, int, dict[str, Any]]


def cases(quick: bool) -> Iterator[Case]:
    """(name, world, arguments of `jobs.parity`)."""
    for model in MODELS[: 1 if quick else None]:
        for mesh, world in MESHES.items():
            for stage in (3,) if quick else (0, 1, 2, 3):
                name = f"{model}, ulysses {mesh[0]} x ring {mesh[1]}, ZeRO {stage}"
                yield name, world, {"model_type": model, "block": block(*mesh), "stage": stage}
    for stage in (1, 2, 3):
        flags = {"reduce_scatter": False}
        yield f"reduce_scatter false, ZeRO {stage}", 2, {"block": block(1, 2), "stage": stage, "zero": flags}
    for reduction in ("mean", "token_mean"):
        more = {"replicas": 2, "accumulation": 2, "reduction": reduction, "batches": masked(jobs.rows(4, 50), [0, 11, 37, 45])}
        yield f"dp 2 x sp 2, accumulation 2, unequal targets, {reduction}", 4, {"block": block(1, 2), "stage": 3, **more}
    for mesh, world in MESHES.items():
        more = {"batches": [packed([13, 1, 1, 22, 5, 1, 20, 2])]}
        yield f"packed, one-token documents, ulysses {mesh[0]} x ring {mesh[1]}", world, {"block": block(*mesh), "stage": 2, **more}
    for side in ("left", "right"):
        yield f"three rows padded {side}", 2, {"block": block(1, 2), "stage": 1, "batches": [padded([40, 9, 23], side)]}
    more = {"replicas": 2, "reduction": "token_mean", "batches": masked(jobs.rows(2, 48), [0, 48])}
    yield "a replica without targets", 4, {"block": block(2, 1), "stage": 3, **more}
    yield "a shard without targets", 4, {"block": block(4, 1), "stage": 1, "batches": masked(jobs.rows(1, 64), [60])}
    yield "2 kv heads, ulysses 4", 4, {"block": block(4, 1), "stage": 3, "changes": {"num_key_value_heads": 2}}
    for reentrant in (True, False):
        name = f"gradient checkpointing, {'reentrant' if reentrant else 'not reentrant'}"
        yield name, 4, {"block": block(2, 2), "stage": 3, "checkpointing": reentrant}


def hybrid_cases() -> Iterator[Case]:
    """Models with Gated DeltaNet layers."""
    for model in HYBRIDS:
        for mesh, world in MESHES.items():
            for stage in (0, 1, 2, 3):
                name = f"{model}, ulysses {mesh[0]} x ring {mesh[1]}, ZeRO {stage}"
                yield name, world, {"model_type": model, "block": block(*mesh), "stage": stage}
        for mesh in ((1, 4), (2, 2)):
            state = {"model_type": model, "block": block(*mesh, linear_attention="state"), "stage": 3}
            yield f"{model}, state, ulysses {mesh[0]} x ring {mesh[1]}", 4, state
            for linear in ("heads", "state"):
                name = f"{model}, packed, one-token documents, {linear}, ulysses {mesh[0]} x ring {mesh[1]}"
                more = {"batches": [packed([13, 1, 1, 22, 5, 1, 20, 2])], "block": block(*mesh, linear_attention=linear)}
                yield name, 4, {"model_type": model, "stage": 3, **more}
    more = {"replicas": 2, "accumulation": 2, "reduction": "token_mean", "batches": masked(jobs.rows(4, 50), [0, 11, 37, 45])}
    yield "qwen3_5_text, dp 2 x sp 2, accumulation 2", 4, {"model_type": HYBRIDS[0], "block": block(1, 2), "stage": 3, **more}
    for reentrant in (True, False):
        name = f"qwen3_5_text, gradient checkpointing, {'reentrant' if reentrant else 'not reentrant'}"
        yield name, 4, {"model_type": HYBRIDS[0], "block": block(2, 2), "stage": 3, "checkpointing": reentrant}
    beyond = {"linear_num_value_heads": 2, "linear_num_key_heads": 1}
    name = "qwen3_5_text, 2 value heads on 4 ranks, state"
    yield name, 4, {"model_type": HYBRIDS[0], "block": block(2, 2), "stage": 3, "changes": beyond}


def windowed_cases() -> Iterator[Case]:
    """Models with sliding windows (11 keys, in every layer or every other one), gemma2 with its softcap too."""
    rows = {"whole": jobs.rows(1, 70)[0], "packed": packed([13, 1, 1, 22, 5, 1, 20, 2]), "packed, 600": packed([300, 13, 1, 286])}
    meshes = [mesh for mesh in MESHES if mesh != (4, 1)]
    for model in WINDOWED:
        for mesh in meshes:
            for name, batch in rows.items():
                case = {"model_type": model, "block": block(*mesh), "stage": 3, "batches": [batch]}
                yield f"{model}, {name}, ulysses {mesh[0]} x ring {mesh[1]}", MESHES[mesh], case
    for window in (2, 8, 17, 70, 1000):  # within a chunk, over several, as long as the row, longer
        case = {"block": block(1, 4), "stage": 3, "changes": {"sliding_window": window}, "length": 70}
        yield f"mistral, window {window}, ulysses 1 x ring 4", 4, {"model_type": "mistral", **case}


def expert_cases() -> Iterator[Case]:
    """Mixtures of experts, with the balance loss where transformers has one."""
    balanced = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    split = {"stage3_param_persistence_threshold": 0}  # ZeRO-3 else keeps parameters as small as these whole
    rows = {"whole": jobs.rows(1, 50)[0], "packed": packed([13, 1, 1, 22, 5, 1, 20, 2])}
    meshes = [mesh for mesh in MESHES if mesh != (4, 1)]
    for model in EXPERTS:
        changes = {} if model in UNBALANCED else balanced
        for mesh in meshes:
            for name, batch in rows.items():
                for stage in (0, 1, 2, 3) if name == "whole" else (3,):
                    case = {"model_type": model, "block": block(*mesh), "stage": stage, "batches": [batch], "changes": changes}
                    case["zero"] = split if stage == 3 else None
                    yield f"{model}, {name}, ulysses {mesh[0]} x ring {mesh[1]}, ZeRO {stage}", MESHES[mesh], case


def vision_cases() -> Iterator[Case]:
    """Vision-language models: images and a video in a row; packed rows where transformers sees their documents."""
    documents = [pictures.row([5, (2, 2), 7]), pictures.text(1), pictures.row([(1, 3), (2, 1), 8], seed=3), pictures.text(1)]
    for model in VISION:
        framed = model != "qwen2_5_vl"
        rows = {"images": pictures.row([5, (2, 2), 3, (1, 3), 2, (2, 1, 2), 26, (3, 2), 4], framed=framed)}
        if "qwen3_5" not in model:
            rows["packed"] = pictures.packed(documents, pictures.positions(model, documents))
        for mesh in MESHES:
            for name, batch in rows.items() if mesh != (4, 1) else ():
                for stage in (0, 1, 2, 3) if name == "images" else (3,):
                    case = {"model_type": model, "block": block(*mesh), "stage": stage, "batches": [batch]}
                    yield f"{model}, {name}, ulysses {mesh[0]} x ring {mesh[1]}, ZeRO {stage}", MESHES[mesh], case


class Fp64(TorchFunctionMode):
    """fp64 wherever code asks for fp32."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        named = {key: _widened(value) for key, value in (kwargs or {}).items()}
        return func(*map(_widened, args), **named)


def _widened(x: Any) -> Any:
    return torch.float64 if x is torch.float32 else x


def own_error(model_type: str, batches: list[Any] | None = None, changes: dict[str, Any] | None = None, **_: Any) -> float:
    """Worst gradient error of transformers' own fp32 run, against its own code in fp64."""
    models = [selftest.tiny_model(model_type, attention="eager", **(changes or {})) for _ in range(2)]
    for model in models:
        model.set_experts_implementation("eager")  # grouped products have no fp64
    rows = batches or jobs.rows(1, 50)
    with Fp64():
        exact = selftest.reference(models[0].double(), rows, "mean")
    return selftest.compare(*selftest.reference(models[1], rows, "mean"), *exact).worst[1]


def measure(chosen: list[Case], own: bool) -> list[dict[str, Any]]:
    """Runs every case; the worst rank counts. With `own` also the reference's own error."""
    pools: dict[int, Pool] = {}
    rows = []
    try:
        for name, world, arguments in chosen:
            pool = pools.setdefault(world, None) or Pool(world)
            pools[world] = pool
            results = pool.run(jobs.parity, **{"model_type": "llama", **arguments})
            loss, parameter, gradient = max(r[1] for r in results), *max(((r[2], r[3]) for r in results), key=lambda x: x[1])
            row = {"case": name, "ranks": world, "loss": loss, "gradient": gradient, "parameter": parameter, "bar": BAR}
            rows.append(row | ({"own_error": own_error(**arguments)} if own else {}))
    finally:
        for pool in pools.values():
            pool.close()
    return rows


def machine() -> dict[str, str]:
    """What the figures were read on."""
    import deepspeed
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False)
    return {
        "script": "scripts/bench/parity.py",
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model at ZeRO 3 and the special rows")
    parser.add_argument("--hybrids", action="store_true", help="models with Gated DeltaNet layers instead")
    parser.add_argument("--windows", action="store_true", help="models with sliding windows and softcap instead")
    parser.add_argument("--experts", action="store_true", help="mixtures of experts, with their balance loss, instead")
    parser.add_argument("--vision", action="store_true", help="vision-language models instead")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose names have it (a regular expression)")
    parser.add_argument("--json", type=Path, help="write the figures and the machine there")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table too")
    arguments = parser.parse_args()
    hybrids = arguments.hybrids
    others = {"hybrids": hybrid_cases, "windows": windowed_cases, "experts": expert_cases, "vision": vision_cases}
    every = next((make() for name, make in others.items() if getattr(arguments, name)), cases(arguments.quick))
    chosen = [case for case in every if re.search(arguments.only, case[0])]
    if not chosen:
        parser.error(f"--only: no case has {arguments.only!r} in its name")
    rows = measure(chosen, own=hybrids)
    table = Table(title="parity with one process")
    for column in ("case", "ranks", "loss error", "worst gradient error", "of", "one process against fp64"):
        table.add_column(column)
    for row in rows:
        mark = "" if max(row["loss"], row["gradient"]) <= row["bar"] else " FAIL"
        own = f"{row['own_error']:.1e}" if hybrids else ""
        figures = f"{row['loss']:.1e}", f"{row['gradient']:.1e}{mark}", row["parameter"], own
        table.add_row(row["case"], str(row["ranks"]), *figures)
    Console(width=160).print(table)
    if arguments.markdown:
        print("| case | ranks | loss error | worst gradient error |\n| --- | --- | --- | --- |")
        print("\n".join(f"| {r['case']} | {r['ranks']} | {r['loss']:.1e} | {r['gradient']:.1e} |" for r in rows))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**machine(), "rows": rows}, indent=1) + "\n")
    if any(max(row["loss"], row["gradient"]) > row["bar"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()

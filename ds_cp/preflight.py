"""Checks of the surroundings before the first collective: what would otherwise hang or train on the wrong ranks."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import nn

AUTOEP = ("deepseek_v3",)
"""Types compared with one process while DeepSpeed's AutoEP spread their experts (tests/dist/test_moe.py)."""

_CACHE = "it gives the model keys and values of its own as a cache, which shards do not have"
_PAST = "it calls the model past the hooks by which rows are shared out"
_ATTENTION = "it has attention of its own beside the model's, which was not compared"
ADAPTERS: Mapping[str, str] = {
    **dict.fromkeys(("PREFIX_TUNING", "CARTRIDGE"), _CACHE),
    **dict.fromkeys(("ADALORA", "XLORA"), _PAST),
    **dict.fromkeys(("ADAPTION_PROMPT", "SHADOW"), _ATTENTION),
    "CPT": "it takes its loss from the logits of whole rows",
    "LILY": "it weighs its experts by the mean over all tokens that a layer sees, which are a shard's",
}
"""Of the peft package: kinds that are refused, and why."""

T = TypeVar("T")

SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where launchers say how many ranks there are: torch's and DeepSpeed's, Open MPI, MPICH and Intel MPI, MVAPICH."""

STALE_AFTER_S = 120.0
"""A build writes files more often than this; a folder that has been quiet for longer has no builder on any host."""


def check_extension_locks(root: Path | None = None) -> None:
    """Waits for a running build of a torch extension, and refuses when its lock was left by a dead process.

    PyTorch's loader waits for such a lock for ever, without a word.

    Raises:
        ValueError: a lock without a builder; the message names the file.
    """
    root = root or _extensions_root()
    told: set[Path] = set()
    while locks := sorted(root.glob("*/lock")):
        for lock in locks:
            if not _is_built(lock.parent) and _quiet_for(lock.parent) > STALE_AFTER_S:
                raise ValueError(
                    f"torch extension: {lock} was left by a process that died while building; every run would wait for it for "
                    "ever. Delete that file and start again"
                )
            if lock not in told:
                told.add(lock)
                print(f"ds_cp: waiting for the build that holds {lock}", flush=True)
        time.sleep(1.0)


def launched() -> int:
    """Ranks that the launcher started, by its environment variables."""
    names = [*SIZES, *(["SLURM_STEP_NUM_TASKS"] if "PMIX_RANK" in os.environ else [])]
    return next((int(os.environ[name]) for name in names if name in os.environ), 1)


def check_world_size() -> None:
    """Refuses when the launcher started another number of ranks than torch.distributed sees.

    Raises:
        ValueError: WORLD_SIZE and the process group disagree.
    """
    if dist.get_world_size() != launched():
        raise ValueError(
            f"world size: the launcher started {launched()} ranks, torch.distributed sees {dist.get_world_size()}; call "
            "deepspeed.init_distributed() (or nothing) before ds_cp.initialize, not a process group of your own"
        )


def refuse_together(reason: str | None) -> None:
    """Raises on every rank what any rank has found; every rank of the job must call it.

    Raises:
        ValueError: one of the ranks has a reason; which one, where not all have the same.
    """
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, reason)
    found = next((text for text in everyone if text is not None), None)
    if found is not None:
        raise ValueError(found if len(set(everyone)) == 1 else f"{found} (rank {everyone.index(found)})")


def together(work: Callable[[], T]) -> T:
    """What `work` returns; where it refuses or fails on one rank, all ranks end. It must not communicate.

    Raises:
        ValueError: on every rank: that of `work`, or the name and message of another error, whose traceback its rank prints.
    """
    done: T | None = None
    reason: str | None = None
    try:
        done = work()
    except ValueError as error:
        reason = str(error)
    except Exception as error:  # of a kernel's compiler, a full disk or memory: the others would wait for this rank
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
    refuse_together(reason)
    return cast(T, done)


def refuse_sections(ds_config: Mapping[str, Any], model_type: str) -> None:
    """Sections of the ds_config that split a model's layers over ranks which here share a row, replace them, or deal with tokens.

    Raises:
        ValueError: one of them is on, and is not exact with this type of model or was not compared.
    """
    if ds_config.get("hybrid_engine", {}).get("enabled") is True:
        raise ValueError(
            "hybrid_engine.enabled: true beside sequence_parallel: outside training it puts kernels of its own in the place of the "
            "model's layers, which would take a shard for the row; set it to false, and generate inside ds_cp.disabled(engine)"
        )
    efficiency = ds_config.get("data_efficiency", {})
    routing = efficiency.get("data_routing", {})
    if any(section.get("enabled") is True for section in (efficiency, routing, routing.get("random_ltd", {}))):
        raise ValueError(
            "data_efficiency: enabled beside sequence_parallel: rows are read by ds_cp's loader or HF's, which do not sample by "
            "it, and dropping tokens (random_ltd) leaves ranks with other tokens than planned; take the section out"
        )
    if ds_config.get("expert_parallel", {}).get("enabled") is True and model_type not in AUTOEP:
        raise ValueError(
            f"expert_parallel.enabled: true beside sequence_parallel is in this version for {', '.join(AUTOEP)}, "
            f"not for {model_type or 'a model that is not named'}: DeepSpeed's AutoEP puts layers of its own in the place of the "
            "model's, which were not compared there (or which DeepSpeed 0.19.8 cannot build with transformers 5.23: Mixtral, "
            "Qwen3-MoE); set it to false, and use ZeRO-3, which splits all experts over all ranks and gathers a layer's for the "
            "time of its use"
        )
    degree = ds_config.get("tensor_parallel", {}).get("autotp_size", 0)
    if degree not in (0, 1, "auto"):
        raise ValueError(
            f"tensor_parallel.autotp_size: {degree} is not in this version beside sequence_parallel; set it to 1, and share rows "
            "over those ranks too (sequence_parallel.size)"
        )


def refuse_adapters(model: nn.Module) -> None:
    """Adapters of the peft package that do something to the tokens of a row, not to each of them alone.

    Raises:
        ValueError: the model has one.
    """
    for module in model.modules():
        found = module.__dict__.get("peft_config", module.__dict__.get("_peft_config"))
        for name, config in (found if isinstance(found, Mapping) else {}).items():
            kind = str(getattr(config.peft_type, "value", config.peft_type))
            reason = ADAPTERS.get(kind)
            if getattr(config, "alora_invocation_tokens", None):
                reason = "an activated LoRA acts from a place of the row on, which it looks for in a shard"
            if reason is not None:
                raise ValueError(
                    f"model: its adapter {name} ({kind}) cannot be trained under sequence parallelism: {reason}; take another kind "
                    "(LoRA, DoRA) or set sequence_parallel.size to 1"
                )


def refuse_compiled(model: nn.Module) -> None:
    """A model, or a part of one, that torch.compile has wrapped or marked: its graphs would be traced through ds_cp's hooks.

    Raises:
        ValueError: one is.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or module.__dict__.get("_compiled_call_impl") is not None:
            raise ValueError(
                f"torch.compile: {name or 'the model'} is compiled, which is not in this version of ds_cp under sequence "
                "parallelism; pass the model as it is"
            )


def _extensions_root() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root:
        return Path(root)
    # Below the default root, torch keeps one folder per Python and CUDA version.
    found = [path for path in Path(get_default_build_root()).glob("py*") if path.is_dir()]
    import sys

    tag = f"py{sys.version_info.major}{sys.version_info.minor}"
    return next((path for path in found if path.name.startswith(tag)), Path(get_default_build_root()))


def _is_built(folder: Path) -> bool:
    """Whether a process of this host works in the folder: ninja is started there."""
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if link.resolve() == folder.resolve():
                return True
        except OSError:
            continue
    return False


def _quiet_for(folder: Path) -> float:
    """Seconds since anything in the folder was written."""
    newest = max((path.stat().st_mtime for path in [folder, *folder.iterdir()] if path.exists()), default=0.0)
    return time.time() - newest

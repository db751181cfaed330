"""Memory of one rank of a large job, counted on a CPU: every tensor that a training step makes, whole and by part of the step.

    DS_ACCELERATOR=cpu python scripts/bench/planner_memory.py --json docs/data/planner_memory.json      # some minutes

One rank under PyTorch's fake process group, as in one_rank.py, of a small Llama in bf16 with AdamW. A dispatch mode sees every
tensor that an operator returns, and when its memory goes; what an operator uses inside and returns to nobody is not seen, nor what
an allocator rounds up. So these are the bytes that a GPU's allocator would count, but for kernels' own workspaces. What
`activation_offload` sends to the host is not counted; what DeepSpeed keeps on the host is: here both are one memory.

    state_mib    what is there between steps: parameters, optimizer, gradients, DeepSpeed's buckets
    peak_mib     the most that a step holds, state included
    mib_by_part  the most while a part of the step runs, above the state; parts as in one_rank.py
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import weakref
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import one_rank
import torch
from alst import machine
from one_rank import REST, RESULT, SAVED, Timeline
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One process. The first fields are those that one_rank.Case has."""

    local_tokens: int
    ulysses: int = 4
    ring: int = 1
    world: int = 4
    layers: int = 4
    checkpointing: bool = True
    stage: int = 3
    zero: dict[str, Any] = field(default_factory=dict)
    block: dict[str, Any] = field(default_factory=dict)
    hidden: int = 256
    inner: int = 896
    vocabulary: int = 4096
    heads: int = 16
    kv_heads: int = 4
    head_size: int = 16
    model_type: str = "llama"
    more: dict[str, Any] = field(default_factory=dict)
    """More of the model's config."""
    contender: str = "ds_cp"
    attention: str = "auto"
    rank: int = 0


ZERO = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000, "stage3_param_persistence_threshold": 1_000}
TRICKS = {"tiled_mlp": True, "activation_offload": True, "loss_chunk": 256}
LONG = 24
LIVE = {"stage3_max_live_parameters": 4_000_000, "stage3_max_reuse_distance": 4_000_000, "stage3_prefetch_bucket_size": 200_000}
"""Parameters of almost five layers are gathered at once, as DeepSpeed's defaults do with Llama-8B's."""


def cases() -> list[Case]:
    """What the planner chooses among, one thing at a time."""
    long = [
        Case(1024, layers=LONG, zero=LIVE, block={"loss_chunk": 256}),
        Case(1024, ulysses=2, ring=2, layers=LONG, zero=LIVE, block=TRICKS),
    ]
    long += [Case(1024, layers=LONG, stage=stage, block={"loss_chunk": 256}) for stage in (0, 1, 2)]
    plain = [Case(tokens) for tokens in (1024, 4096)]
    stages = [Case(1024, stage=stage, zero={"offload_optimizer": {"device": "cpu"}}) for stage in (1, 2, 3)]
    stages += [Case(1024, stage=3, zero={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}})]
    splits = [Case(2048, ulysses=u, ring=4 // u, block={"loss_chunk": 256}) for u in (4, 2, 1)]
    splits += [Case(2048, ulysses=1, ring=4, block={"loss_chunk": 256, "ring_impl": "allgather"})]
    knobs = [
        Case(2048, block={"loss_chunk": 256} | more)
        for more in ({"tiled_mlp": True}, {"activation_offload": True, "attention_head_chunks": 1})
    ]
    knobs += [Case(2048, block=TRICKS | {"attention_head_chunks": n}) for n in (1, 2, 4)]
    knobs += [Case(2048, checkpointing=False, block={"loss_chunk": 256} | more) for more in ({}, {"tiled_mlp": True})]
    knobs += [Case(2048, ulysses=1, ring=4, checkpointing=False, block={"loss_chunk": 256, "tiled_mlp": True})]
    return others() + long + plain + splits + knobs + stages


EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 448, "decoder_sparse_step": 1}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 512}
HYBRID = {"linear_num_value_heads": 16, "linear_num_key_heads": 8, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
HYBRID |= {"layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]}


def others() -> list[Case]:
    """Norms of queries and keys, experts, windows with a tied head, Gated DeltaNet."""
    block = {"loss_chunk": 256}
    kinds = {"qwen3": {}, "qwen3_moe": EXPERTS, "gemma3_text": LAYERS, "qwen3_5_text": HYBRID}
    return [Case(tokens, model_type=kind, more=more, block=block) for kind, more in kinds.items() for tokens in (1024, 2048)]


class Live(TorchDispatchMode):
    """Bytes of the storages that operators have returned and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref] = {}
        self.host = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type == "cpu":
                self._see(x.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return

        def gone(_: Any) -> None:
            self._seen.pop(key, None)
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class Counted(Timeline):
    """Marks that note memory."""

    def __init__(self, live: Live) -> None:
        super().__init__(cuda=False)
        self.live = live

    def mark(self, enter: str | None = None) -> None:
        self.stack = [*self.stack, enter] if enter else self.stack[:-1]
        moment, self.live.peak = (self.live.peak, self.live.now), self.live.now
        self.marks.append((moment, self.stack[-1] if self.stack else REST))


def initialize(model: Any, case: Case, mpu: Any = None) -> Any:
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
    config |= {"zero_optimization": {"stage": case.stage, **ZERO, **case.zero}, "bf16": {"enabled": True}}
    config |= {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    config |= {"sequence_parallel_size": case.world, "steps_per_print": 10**9}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=mpu)[0]


def make_config(case: Case) -> Any:
    from transformers import CONFIG_MAPPING

    shape = {"hidden_size": case.hidden, "intermediate_size": case.inner, "vocab_size": case.vocabulary, "head_dim": case.head_size}
    shape |= {"num_attention_heads": case.heads, "num_key_value_heads": case.kv_heads, "num_hidden_layers": case.layers}
    return CONFIG_MAPPING[case.model_type](**shape, **case.more, max_position_embeddings=2**20, use_cache=False)


def make_model(case: Case) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(make_config(case), dtype=torch.bfloat16).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def measure(case: Case) -> dict[str, Any]:
    timeline = one_rank.become_rank(case)
    live = Live()
    with live:
        timeline = Counted(live)
        one_rank.initialize = initialize
        offloaded = _without_host_copies(live)
        model = make_model(case)
        engine, forward = one_rank.build_ours(model, case, timeline)
        llama = case.model_type == "llama"
        step = one_rank.stepping(model, engine, forward, timeline) if llama else _stepping(engine, forward)
        row = one_rank.make_row(case.world * case.local_tokens, case.vocabulary)
        for _ in range(2):
            step(row)
        state = live.now
        if not llama:
            live.peak = state
            step(row)
            return {"parameters": _numel(model), "state_mib": state / MIB, "peak_mib": live.peak / MIB, "mib_by_part": {}}
        parts = timeline.record("memory", lambda: step(row))
    del offloaded
    by_part = {part or REST: (size - state) / MIB for part, size in parts.items()}
    peak = max(size for part, size in parts.items() if part != SAVED) / MIB
    return {"parameters": _numel(model), "state_mib": state / MIB, "peak_mib": peak, "mib_by_part": by_part}


def _stepping(engine: Any, forward: Any) -> Any:
    """A step without marks, for any model."""

    def step(row: dict[str, torch.Tensor]) -> None:
        engine.backward(forward(row))
        engine.step()

    return step


def _numel(model: Any) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def _without_host_copies(live: Live) -> Any:
    """Copies of `activation_offload` that would be on the host are not counted."""
    from ds_cp import offload

    send = offload.Offload._send

    def unseen(self: Any, x: torch.Tensor) -> Any:
        kept = send(self, x)
        for piece in kept.host:
            key = piece.untyped_storage()._cdata
            if live._seen.pop(key, None) is not None:
                live.now -= piece.untyped_storage().nbytes()
        return kept

    offload.Offload._send = unseen
    return send


def run(case: Case, timeout: float, console: Console) -> dict[str, Any]:
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
    env = {"RANK": str(case.rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(case.world), "PYTHONPATH": path}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, __file__, "--worker", json.dumps(asdict(case))]
    try:
        out = subprocess.run(command, env=os.environ | env, timeout=timeout, capture_output=True, text=True)
    except subprocess.TimeoutExpired as error:
        console.print(f"longer than {error.timeout:.0f} s")
        return {"outcome": "failed"}
    found = [line.removeprefix(RESULT) for line in out.stdout.splitlines() if line.startswith(RESULT)]
    if not found:
        console.print(out.stdout[-2000:], out.stderr[-3000:], markup=False)
        return {"outcome": "failed"}
    return {"outcome": "ok", **json.loads(found[0])}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, help="only so many cases")
    parser.add_argument("--case", type=json.loads, help="one case, fields as JSON")
    parser.add_argument("--timeout", type=float, default=300)
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    return parser.parse_args()


def main() -> None:
    args, console, rows = parse(), Console(), []
    chosen = [Case(**args.case)] if args.case else cases()[: args.first]
    for case in chosen:
        rows.append(asdict(case) | run(case, args.timeout, console))
        console.print(
            {key: rows[-1].get(key) for key in ("stage", "block", "zero", "local_tokens", "state_mib", "peak_mib", "mib_by_part")}
        )
        if args.json:
            args.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    sys.exit(any(row["outcome"] != "ok" for row in rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print("", RESULT + json.dumps(measure(Case(**json.loads(sys.argv[2])))), sep="\n")
    else:
        main()

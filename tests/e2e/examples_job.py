"""Runs the example scripts one after another in the same processes, so that these start once.

    python -m tests.e2e.examples_job JOBS.json OUTPUT.json             # the sharded scripts, in each rank
    python -m tests.e2e.examples_job JOBS.json OUTPUT.json --upstream  # TRL's, in one process

JOBS.json: name -> [script, arguments]. OUTPUT.json, of rank 0: name -> the Trainer's log history, or why it was refused.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState

import ds_cp
from ds_cp import mesh

EXAMPLES = Path(__file__).parents[2] / "scripts" / "examples"


def main(jobs: str, output: str, *upstream: str) -> None:
    logs: dict[str, Any] = {}
    if not upstream:
        ds_cp.init_distributed()  # on CPU TrainingArguments makes torch's group alone, and ZeRO-3 wants DeepSpeed's before a model
    for name, (script, arguments) in json.loads(Path(jobs).read_text(encoding="utf-8")).items():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        path = EXAMPLES / ("upstream" if upstream else "") / f"{script}.py"
        path = path if path.exists() else Path(__file__).with_name(f"{script}_script.py")
        spec = importlib.util.spec_from_file_location(script, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            trainer = module.main(arguments)
        except ValueError as refusal:
            logs[name] = str(refusal)
            continue
        logs[name] = trainer.state.log_history
        if not upstream:
            trainer.cp_handle.remove()
            mesh.destroy(trainer.cp_mesh)
            trainer.accelerator.deepspeed_engine_wrapped.engine.destroy()
        del trainer, module
        gc.collect()
    if int(os.environ.get("RANK", "0")) == 0:
        Path(output).write_text(json.dumps(logs), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

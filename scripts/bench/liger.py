"""Liger's fused linear cross entropy on one GPU: its gradients and ds_cp's against whole logits in fp64.

    python scripts/bench/liger.py --json docs/data/h200_liger.json      # seconds

1,999 tokens of which a tenth has no target, hidden size 512, vocabulary 32,000. `error` is the worst entry of a gradient over the
largest in fp64; `limit` the same of whole logits in the dtype of the row. "times 0.37" multiplies the loss before backward, as
accumulation, a loss scale or a factor of one's own do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a plain checkout needs no installation

import torch
from alst import machine, show
from rich.console import Console
from torch import Tensor
from torch.nn import functional

TOKENS, HIDDEN, VOCABULARY = 1999, 512, 32000
Loss = Callable[[Tensor, Tensor], Tensor]


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states, weight, targets)."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(TOKENS, HIDDEN, device="cuda", generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, device="cuda", generator=generator) / HIDDEN**0.5
    targets = torch.randint(0, VOCABULARY, (TOKENS,), device="cuda", generator=generator)
    targets[::10] = -100
    return x.to(dtype), weight.to(dtype), targets


def gradients(loss: Loss, x: Tensor, weight: Tensor, targets: Tensor, factor: float) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    (factor * loss(*leaves, targets)).backward()
    return [t.grad for t in leaves]


def ways(reduction: str) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    from ds_cp.tiled_head import Head, Terms, tiled_loss

    def ours(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        head = Head(partial(functional.linear, weight=weight), (weight,), True)
        value, _ = tiled_loss(x.unsqueeze(0), head, 512, targets.unsqueeze(0), None, Terms())
        return value / (targets != -100).sum() if reduction == "mean" else value

    def liger(dtype: torch.dtype | None) -> Loss:
        fused = LigerFusedLinearCrossEntropyLoss(reduction=reduction, accum_dtype=dtype)
        return lambda x, weight, targets: fused(weight, x, targets)

    return {"ds_cp": ours, "Liger": liger(None), "Liger, accum_dtype fp32": liger(torch.float32)}


def whole(reduction: str, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(functional.linear(x, weight), targets, reduction=reduction)


def rows() -> list[dict[str, Any]]:
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, targets = drawn(dtype)
        for reduction, factor in (("mean", 1.0), ("sum", 1.0), ("mean", 0.37)):
            exact = gradients(partial(whole, reduction), x.double(), weight.double(), targets, factor)
            plain = errors(gradients(partial(whole, reduction), x, weight, targets, factor), exact)
            for name, loss in ways(reduction).items():
                mine = errors(gradients(loss, x, weight, targets, factor), exact)
                case = f"{reduction}, times {factor:g}" if factor != 1 else reduction
                found.append(
                    {"section": "liger", "way": name, "dtype": str(dtype).removeprefix("torch."), "loss": case}
                    | {"hidden_error": mine[0], "weight_error": mine[1], "hidden_limit": plain[0], "weight_limit": plain[1]}
                )
    return found


def errors(got: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [float((g.double() - w).abs().max() / w.abs().max()) for g, w in zip(got, wanted, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows and the machine here")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    found = rows()
    show(found, Console(), False)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

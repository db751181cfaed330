"""The output head and its loss by Liger's fused linear cross entropy, for `loss_kernel: liger`.

Source: Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM Training, 2024 (the package liger-kernel). It picks its own
tiles. Its sum of the weight's gradient is asked for in fp32: left alone it is rounded in every tile (docs/benchmarks.md).

T local tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ds_cp.batch import IGNORE
from ds_cp.tiled_head import Head, Terms


def missing() -> str | None:
    """Why Liger cannot be loaded here, if so."""
    try:
        importlib.import_module("liger_kernel.transformers")
    except (ImportError, RuntimeError) as error:  # Triton without a driver is a RuntimeError
        return str(error)
    return None


def liger_loss(hidden_1TD: Tensor, head: Head, targets_1T: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """What `tiled_head.tiled_loss` gives, of a linear head whose output is not scaled and without weights of tokens."""
    needs = torch.is_grad_enabled()
    return _LigerLoss.apply(hidden_1TD, head, targets_1T.flatten(), terms, needs, *head.parameters)


class _LigerLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Head, targets: Tensor, terms: Terms, needs: bool, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(
            ignore_index=IGNORE,
            lse_square_scale=terms.z_loss,
            label_smoothing=terms.label_smoothing,
            reduction="sum",
            softcap=head.softcap,
            accum_dtype=torch.float32,
        )
        wanted = [needs and need for need in (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:])]
        leaves = [x.detach().requires_grad_(need) for x, need in zip((hidden, *parameters), wanted, strict=True)]
        x, weight, *bias = leaves
        with torch.enable_grad():
            loss = fused(weight, x.flatten(0, 1), targets, *bias)
        asked = [leaf for leaf, need in zip(leaves, wanted, strict=True) if need]
        found = iter(torch.autograd.grad(loss, asked) if asked else ())
        ctx.gradients = [next(found) if need else None for need in wanted]
        return loss.detach().float(), functional.linear(hidden[:, :1].detach(), *parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("ds_cp: Liger's loss was given backward twice; set sequence_parallel.loss_kernel to auto for that")
        d_hidden, *d_parameters = (None if x is None else x.mul_(grad) for x in gradients)
        return d_hidden, None, None, None, None, *d_parameters

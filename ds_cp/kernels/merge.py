"""Merging partial attentions of the same queries over disjoint keys (Rabe and Staats 2021; Liu et al. 2023); summing dq."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

AT_ONCE = 2
"""Blocks that one call of the fused kernel takes: the running result is read and written once for all of them."""


def merge_(out_TNH: Tensor, lse_TN: Tensor, blocks: Sequence[tuple[Tensor, Tensor]], into_TNH: Tensor | None = None) -> None:
    """Adds blocks (out, lse) to the running (out, lse), any strides; lse in place, out in place or into another tensor.

        lse' = log(exp lse + sum_b exp lse_b);  out' = out exp(lse - lse') + sum_b out_b exp(lse_b - lse')

    lse is fp32 (fp64 for fp64) and finite: step 0 gives every query its own key. The result is fp32 (fp64 for fp64); out may be of
    lower precision where `into` is given, the blocks' out always. On CUDA one kernel does it.

    Args:
        blocks: one to AT_ONCE.
    """
    into_TNH = out_TNH if into_TNH is None else into_TNH
    assert into_TNH.dtype == lse_TN.dtype
    assert 0 < len(blocks) <= AT_ONCE
    if out_TNH.is_cuda and into_TNH.dtype == torch.float32:
        from ds_cp.kernels.merge_cuda import merge_fused_

        merge_fused_(out_TNH, lse_TN, blocks, into_TNH)
    else:
        merge_reference_(out_TNH, lse_TN, blocks, into_TNH)


def merge_reference_(out_TNH: Tensor, lse_TN: Tensor, blocks: Sequence[tuple[Tensor, Tensor]], into_TNH: Tensor) -> None:
    """`merge_` in PyTorch's own operations."""
    if into_TNH is not out_TNH:
        into_TNH.copy_(out_TNH)
    for block_out_TNH, block_lse_TN in blocks:
        weight_TN = torch.sigmoid(block_lse_TN - lse_TN)  # exp(block_lse - lse')
        into_TNH.lerp_(block_out_TNH.to(into_TNH.dtype), weight_TN.unsqueeze(-1))
        lse_TN.copy_(torch.logaddexp(lse_TN, block_lse_TN))


def total(base_TNH: Tensor, parts: Sequence[tuple[int, Tensor]], dtype: torch.dtype) -> Tensor:
    """base plus every part from its first token on, summed in fp32 (fp64 for fp64) and rounded to `dtype` once.

    Args:
        parts: (first token, [tokens, N, H]), not reaching beyond base.
    """
    if base_TNH.is_cuda and 0 < len(parts) <= AT_ONCE and base_TNH.dtype != torch.float64:
        from ds_cp.kernels.merge_cuda import total_fused

        return total_fused(base_TNH, parts, dtype)
    work = torch.promote_types(base_TNH.dtype, torch.float32)
    out = base_TNH.to(work)
    for start, part in parts:
        out[start : start + len(part)] += part
    return out.to(dtype)

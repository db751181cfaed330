"""Merging partial attentions of the same queries over disjoint keys (Rabe and Staats 2021; Liu et al. 2023); summing dq."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

AT_ONCE = 15
"""Blocks that one call takes: the running result is read and written once for all of them."""

Block = tuple[int, Tensor, Tensor]
"""(first query, out_TNH, lse_TN) of so many queries from there on."""
Part = tuple[int, Tensor]
"""(first query, dq_TNH)."""


def merge_(out_TNH: Tensor, lse_TN: Tensor, blocks: Sequence[Block], into_TNH: Tensor | None = None) -> None:
    """Adds blocks to the running (out, lse), any strides; lse in place, out in place or into another tensor.

        lse' = log(exp lse + sum_b exp lse_b);  out' = out exp(lse - lse') + sum_b out_b exp(lse_b - lse')

    lse is fp32 (fp64 for fp64) and finite: step 0 gives every query its own key. The sum is taken in lse's precision and rounded
    once to that of the result; out and the blocks' out may be of lower precision. On CUDA one kernel does it.

    Args:
        blocks: one to AT_ONCE, not reaching beyond out.
    """
    into_TNH = out_TNH if into_TNH is None else into_TNH
    assert 0 < len(blocks) <= AT_ONCE
    if out_TNH.is_cuda and lse_TN.dtype == torch.float32:
        from ds_cp.kernels.merge_cuda import merge_fused_

        merge_fused_(out_TNH, lse_TN, blocks, into_TNH)
    else:
        merge_reference_(out_TNH, lse_TN, blocks, into_TNH)


def merge_reference_(out_TNH: Tensor, lse_TN: Tensor, blocks: Sequence[Block], into_TNH: Tensor) -> None:
    """`merge_` in PyTorch's own operations."""
    in_place = into_TNH is out_TNH and out_TNH.dtype == lse_TN.dtype
    running_TNH = out_TNH if in_place else out_TNH.to(lse_TN.dtype, copy=True)
    for start, block_out_TNH, block_lse_TN in blocks:
        part = slice(start, start + len(block_lse_TN))
        weight_TN = torch.sigmoid(block_lse_TN - lse_TN[part])  # exp(block_lse - lse')
        running_TNH[part].lerp_(block_out_TNH.to(running_TNH.dtype), weight_TN.unsqueeze(-1))
        lse_TN[part] = torch.logaddexp(lse_TN[part], block_lse_TN)
    if not in_place:
        into_TNH.copy_(running_TNH)


def total(base_TNH: Tensor, parts: Sequence[Part], dtype: torch.dtype) -> Tensor:
    """base plus every part from its first query on, summed in fp32 (fp64 for fp64) and rounded to `dtype` once.

    Args:
        parts: not reaching beyond base. On CUDA, AT_ONCE of them are read in one pass.
    """
    work = torch.promote_types(base_TNH.dtype, torch.float32)
    if base_TNH.is_cuda and parts and work == torch.float32:
        from ds_cp.kernels.merge_cuda import total_fused

        for first in range(0, len(parts), AT_ONCE):
            some = parts[first : first + AT_ONCE]
            base_TNH = total_fused(base_TNH, some, dtype if first + AT_ONCE >= len(parts) else work)
        return base_TNH
    out = base_TNH.to(work, copy=bool(parts))
    for start, part in parts:
        out[start : start + len(part)] += part
    return out.to(dtype)

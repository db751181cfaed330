"""Merging two partial attentions of the same queries over disjoint keys (Rabe and Staats 2021; Liu et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_(out_TNH: Tensor, lse_TN: Tensor, block_out_TNH: Tensor, block_lse_TN: Tensor) -> None:
    """Adds a block to the running (out, lse), in place, any strides.

        lse' = log(exp lse + exp block_lse);  out' = out exp(lse - lse') + block_out exp(block_lse - lse')

    out and lse are fp32 (fp64 for fp64) and finite: step 0 gives every query its own key. block_out may be bf16 or fp16. On CUDA
    one kernel does it: every element is read and written once.
    """
    if out_TNH.is_cuda and out_TNH.dtype == torch.float32:
        from ds_cp.kernels.merge_cuda import merge_fused_

        merge_fused_(out_TNH, lse_TN, block_out_TNH, block_lse_TN)
    else:
        merge_reference_(out_TNH, lse_TN, block_out_TNH, block_lse_TN)


def merge_reference_(out_TNH: Tensor, lse_TN: Tensor, block_out_TNH: Tensor, block_lse_TN: Tensor) -> None:
    """`merge_` in PyTorch's own operations."""
    weight_TN = torch.sigmoid(block_lse_TN - lse_TN)  # exp(block_lse - lse')
    out_TNH.lerp_(block_out_TNH.to(out_TNH.dtype), weight_TN.unsqueeze(-1))
    lse_TN.copy_(torch.logaddexp(lse_TN, block_lse_TN))

"""flash-attn 4's Hopper kernels, launched for a ring: without the package's general front end, and with dq summed in place.

The front end chooses among all its kernels anew for every call (100 us of host time, more than a small tile computes), and its
backward begins and ends for every tile what a ring needs once for all tiles of the same queries:

    once     delta = rowsum(dout * out), lse in base 2, dq_sum = 0       flash-attn's preprocess
    a tile   dq_sum += its dq;  its dk, dv                               flash-attn's backward kernel
    once     dq = scale * dq_sum, in q's dtype                           flash-attn's postprocess

Dense tiles only: rectangles, and in forward one causal document. What is used here is private to the package, so `Launcher` refuses
versions that it was not tried with; its caller then goes through the front end.

Shapes: B sequences, T query tokens, S key tokens, N query heads, M key/value heads, H head size.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

VERSIONS = ("4.0.0b36",)
FEWEST_TOKENS = 257
"""Queries and keys of a tile: with a single block of either the package compiles another kernel."""


class Launcher:
    """Compiled kernels, by what they depend on; compiling one takes a second or two."""

    def __init__(self) -> None:
        found = version("flash-attn-4")
        if found not in VERSIONS:
            raise ImportError(f"flash-attn-4 {found} was not tried; tried: {', '.join(VERSIONS)}")
        import cutlass.cute as cute
        from flash_attn.cute import cute_dsl_utils, flash_bwd_sm90, flash_fwd_sm90, interface, utils

        self.interface, self._cute, self._to_cute = interface, cute, cute_dsl_utils.to_cute_tensor
        self._forward_kernel = flash_fwd_sm90.FlashAttentionForwardSm90
        self._backward_kernel = flash_bwd_sm90.FlashAttentionBackwardSm90
        # After the scale: cu_seqlens (2), seqused (2), page table or semaphores, windows (2), sink, sparsity; then batch lookups.
        self._rest = (*[None] * 9, utils.AuxData(None, None), None, None)
        self._compiled: dict[tuple, Any] = {}

    def forward(self, q_BTNH: Tensor, k_BSMH: Tensor, v_BSMH: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """(out [B, T, N, H], lse [B, N, T])."""
        batch, tokens, heads, size = q_BTNH.shape
        out = q_BTNH.new_empty(q_BTNH.shape)
        lse = q_BTNH.new_empty((batch, heads, tokens), dtype=torch.float32)
        tensors = (q_BTNH, k_BSMH, v_BSMH, out, lse)
        key = (causal, q_BTNH.dtype, size, heads // k_BSMH.shape[2])
        run = self._compiled.get(key) or self._compile(key, self._forward_of(key), tensors, scale)
        run(*tensors, scale, *self._rest)
        return out, lse

    def backward(self, tensors: tuple[Tensor, ...], scale: float) -> None:
        """Fills (dk, dv) and adds to dq_sum, of (q, k, v, dout, lse_log2, delta, dq_sum, dk, dv), for a rectangle."""
        q, k = tensors[:2]
        key = ("backward", q.dtype, q.shape[-1], q.shape[2] // k.shape[2])
        run = self._compiled.get(key) or self._compile(key, self._backward_of(key), tensors, scale)
        run(*tensors, scale, *self._rest)

    def _compile(self, key: tuple, kernel: Any, tensors: tuple[Tensor, ...], scale: float) -> Any:
        stream = self._cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
        arguments = [self._to_cute(x, assumed_align=4 if x.ndim == 3 and key[0] != "backward" else 16) for x in tensors]
        run = self._cute.compile(kernel, *arguments, scale, *self._rest, stream, options="--enable-tvm-ffi")
        self._compiled[key] = run
        return run

    def _forward_of(self, key: tuple) -> Any:
        causal, dtype, size, ratio = key
        plan = self.interface._tile_size_fwd_sm90(size, size, causal, False)
        return self._forward_kernel(
            self.interface.torch2cute_dtype_map[dtype],
            size,
            size,
            ratio,
            is_causal=causal,
            is_local=False,
            pack_gqa=ratio > 1,
            tile_m=plan.m_block_size,
            tile_n=plan.n_block_size,
            num_stages=2,
            num_threads=384,
            Q_in_regs=False,
            intra_wg_overlap=plan.intra_wg_overlap,
            mma_pv_is_rs=plan.mma_pv_is_rs,
        )

    def _backward_of(self, key: tuple) -> Any:
        _, dtype, size, ratio = key
        plan = self.plan(size)
        return self._backward_kernel(
            self.interface.torch2cute_dtype_map[dtype],
            size,
            size,
            ratio,
            is_causal=False,
            is_local=False,
            deterministic=False,
            tile_m=plan.m_block_size,
            tile_n=plan.n_block_size,
            Q_stage=plan.num_stages_Q,
            dO_stage=plan.num_stages_dO,
            PdS_stage=plan.num_stages_PdS,
            SdP_swapAB=plan.SdP_swapAB,
            dKV_swapAB=plan.dKV_swapAB,
            dQ_swapAB=plan.dQ_swapAB,
            AtomLayoutMSdP=plan.AtomLayoutMSdP,
            AtomLayoutNdKV=plan.AtomLayoutNdKV,
            AtomLayoutMdQ=plan.AtomLayoutMdQ,
            num_threads=(plan.num_wg + 1) * 128,
            q_subtile_factor=2,
            dQ_single_wg=plan.dQ_single_wg,
        )

    def plan(self, size: int) -> Any:
        """The package's block sizes for the backward of a rectangle."""
        return self.interface._tile_size_bwd_sm90(size, size, False, False)


class Queries:
    """The backward of rectangles that share their queries: `backward` for each, then `dq` once."""

    def __init__(self, launcher: Launcher, dout_TNH: Tensor, q_TNH: Tensor, out_TNH: Tensor, lse_TN: Tensor, scale: float) -> None:
        self._launcher, self._scale = launcher, scale
        self._q, self._dout = q_TNH.unsqueeze(0), dout_TNH.unsqueeze(0)
        tokens, heads, size = q_TNH.shape
        self._plan = plan = launcher.plan(size)
        self._multiple = 64 if plan.dKV_swapAB else 32
        rows = _up(tokens, plan.m_block_size)
        new = q_TNH.new_empty
        self._delta, self._lse_log2 = (new((1, heads, rows), dtype=torch.float32) for _ in range(2))
        self._dq_sum = new((1, heads, rows * _up(size, self._multiple)), dtype=torch.float32)
        launcher.interface._bwd_preprocess(
            out_TNH.unsqueeze(0),
            self._dout,
            self._delta,
            lse_TN.transpose(0, 1).unsqueeze(0),
            self._lse_log2,
            self._dq_sum,
            None,
            None,
            None,
            launcher.interface.torch2cute_dtype_map[q_TNH.dtype],
            size,
            size,
            plan.m_block_size,
            hdim_multiple_of=self._multiple,
            fake_mode=False,
        )

    @staticmethod
    def takes(k_SMH: Tensor) -> bool:
        return len(k_SMH) >= FEWEST_TOKENS

    def backward(self, k_SMH: Tensor, v_SMH: Tensor) -> Tensor:
        """(dk, dv) [2, S, M, H] of one rectangle; its dq is added to the sum."""
        k, v = k_SMH.unsqueeze(0), v_SMH.unsqueeze(0)
        dkv = k_SMH.new_empty((2, 1, *k_SMH.shape))
        dk, dv = dkv.unbind(0)
        shared = k.shape[2] != self._q.shape[2]  # query heads add into their key/value head in fp32
        into = self._sums(k) if shared else (dk, dv)
        self._launcher.backward((self._q, k, v, self._dout, self._lse_log2, self._delta, self._dq_sum, *into), self._scale)
        if shared:
            plan = self._plan
            self._finish(into[0], dk, self._scale, plan.n_block_size, plan.AtomLayoutNdKV, plan.dKV_swapAB, plan.num_wg * 128)
            self._finish(into[1], dv, 1.0, plan.n_block_size, plan.AtomLayoutNdKV, plan.dKV_swapAB, plan.num_wg * 128)
        return dkv.squeeze(1)

    def dq(self) -> Tensor:
        """[T, N, H], q's dtype."""
        plan, dq = self._plan, self._q.new_empty(self._q.shape)
        threads = 128 if plan.dQ_single_wg else plan.num_wg * 128
        self._finish(self._dq_sum, dq, self._scale, plan.m_block_size, plan.AtomLayoutMdQ, plan.dQ_swapAB, threads)
        return dq.squeeze(0)

    def _sums(self, k: Tensor) -> tuple[Tensor, Tensor]:
        elements = _up(k.shape[1], self._plan.n_block_size) * _up(k.shape[3], self._multiple)
        both = k.new_zeros((2, 1, k.shape[2], elements), dtype=torch.float32)
        return both.unbind(0)

    def _finish(self, source: Tensor, to: Tensor, scale: float, block: int, atoms: int, swap: bool, threads: int) -> None:
        interface = self._launcher.interface
        dtype, size = interface.torch2cute_dtype_map[to.dtype], to.shape[-1]
        fixed = {"hdim_multiple_of": self._multiple, "fake_mode": False}
        interface._bwd_postprocess_convert(source, to, scale, None, None, 90, dtype, size, block, threads, atoms, swap, **fixed)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple

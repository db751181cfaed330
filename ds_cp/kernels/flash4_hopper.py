"""flash-attn 4's Hopper kernels, launched for a ring: without the package's general front end, gradients summed in place.

The front end chooses among all its kernels anew for every call (100 us of host time, more than a small tile computes), and its
backward begins and ends for every tile what a ring needs once:

    queries    delta = rowsum(dout * out), lse in base 2, dq_sum = 0       flash-attn's preprocess
    a tile     dq_sum += its dq;  dk_sum += its dk;  dv_sum += its dv      flash-attn's backward kernel
    queries    dq = scale * dq_sum, in q's dtype                           flash-attn's postprocess
    home       (dk, dv) = (scale * dk_sum, dv_sum), in k's dtype           kernels.blocked

dk_sum and dv_sum exist where query heads share key/value heads: there the kernel adds in fp32 anyway, in an order of its own, and
the sums travel around the ring as they are. It adds whole blocks of keys, so each run of keys at whose first key rectangles begin
(`Plan.starts`) begins a block of its own. Heads that share nothing are written in k's dtype and added outside.

Dense tiles only: rectangles and one causal document. What is used here is private to the package, so `Launcher` refuses versions
that it was not tried with; its caller then goes through the front end.

Shapes: B sequences, T query tokens, S key tokens, N query heads, M key/value heads, H head size, 2 for (dk, dv).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ds_cp.kernels import blocked
from ds_cp.kernels.sums import ONE_RUN, Backward, PlainSums
from ds_cp.tiles import Tile

VERSIONS = ("4.0.0b36",)
FEWEST_TOKENS = 257
"""Queries and keys of a tile: with a single block of either the package compiles another kernel."""


class Launcher:
    """Compiled kernels, by what they depend on; compiling one takes a second or two."""

    def __init__(self) -> None:
        self.version = version("flash-attn-4")
        if self.version not in VERSIONS:
            raise ImportError(f"flash-attn-4 {self.version} was not tried; tried: {', '.join(VERSIONS)}")
        import cutlass.cute as cute
        from flash_attn.cute import cute_dsl_utils, flash_bwd_sm90, flash_fwd_sm90, interface, utils

        self.interface, self._cute, self._to_cute = interface, cute, cute_dsl_utils.to_cute_tensor
        self._forward_kernel = flash_fwd_sm90.FlashAttentionForwardSm90
        self._backward_kernel = flash_bwd_sm90.FlashAttentionBackwardSm90
        # After the scale: cu_seqlens (2), seqused (2), page table or semaphores, windows (2), sink, sparsity; then batch lookups.
        self._rest = (*[None] * 9, utils.AuxData(None, None), None, None)
        self._compiled: dict[tuple, Any] = {}
        self._places: dict[tuple, Tensor] = {}

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

    def backward(self, tensors: tuple[Tensor, ...], causal: bool, scale: float) -> None:
        """Of (q, k, v, dout, lse_log2, delta, dq_sum, dk, dv): adds to dq_sum; fills (dk, dv), or adds where heads are shared."""
        q, k = tensors[:2]
        key = ("backward", causal, q.dtype, q.shape[-1], q.shape[2] // k.shape[2])
        run = self._compiled.get(key) or self._compile(key, self._backward_of(key), tensors, scale)
        run(*tensors, scale, *self._rest)

    def preprocess(self, out_BTNH: Tensor, dout_BTNH: Tensor, lse_BNT: Tensor, into: tuple[Tensor, ...], causal: bool) -> None:
        """Fills (delta, lse_log2, dq_sum)."""
        size, (delta, lse_log2, dq_sum) = out_BTNH.shape[-1], into
        self.interface._bwd_preprocess(
            out_BTNH,
            dout_BTNH,
            delta,
            lse_BNT,
            lse_log2,
            dq_sum,
            None,
            None,
            None,
            self.interface.torch2cute_dtype_map[out_BTNH.dtype],
            size,
            size,
            self.plan(size, causal).m_block_size,
            hdim_multiple_of=self.multiple(size),
            fake_mode=False,
        )

    def finish_dq(self, dq_sum: Tensor, dq_BTNH: Tensor, causal: bool, scale: float) -> None:
        plan = self.plan(dq_BTNH.shape[-1], causal)
        threads = 128 if plan.dQ_single_wg else plan.num_wg * 128
        self._convert(dq_sum, dq_BTNH, scale, plan.m_block_size, threads, plan.AtomLayoutMdQ, plan.dQ_swapAB)

    def finish_dkv(self, dkv_sum: Tensor, dkv_BSMH: Tensor, scale: float) -> None:
        plan = self.plan(dkv_BSMH.shape[-1])
        self._convert(dkv_sum, dkv_BSMH, scale, plan.n_block_size, plan.num_wg * 128, plan.AtomLayoutNdKV, plan.dKV_swapAB)

    def _convert(self, source: Tensor, to: Tensor, scale: float, block: int, threads: int, atoms: int, swap: bool) -> None:
        dtype, size = self.interface.torch2cute_dtype_map[to.dtype], to.shape[-1]
        fixed = {"hdim_multiple_of": self.multiple(size), "fake_mode": False}
        self.interface._bwd_postprocess_convert(
            source, to, scale, None, None, 90, dtype, size, block, threads, atoms, swap, **fixed
        )

    def place(self, like: Tensor) -> Tensor:
        """[block, H]: where element h of key n stands in a block of dk_sum, found out with the package's own conversion."""
        key = (like.shape[-1], like.device)
        if key not in self._places:
            at = torch.arange(self.block_elements(like.shape[-1]), device=like.device)
            digits = torch.stack((at % 256, at // 256)).float().unsqueeze(1)  # each is exact in fp16 and bf16
            found = like.new_empty((2, self.plan(like.shape[-1]).n_block_size, 1, like.shape[-1]))
            self.finish_dkv(digits, found, 1.0)
            low, high = found.squeeze(2).to(torch.int32)
            self._places[key] = low + 256 * high
        return self._places[key]

    def block_elements(self, size: int) -> int:
        """Of dk_sum, a block of keys of one head."""
        return self.plan(size).n_block_size * _up(size, self.multiple(size))

    def multiple(self, size: int) -> int:
        """What the package rounds head sizes up to."""
        return 64 if self.plan(size).dKV_swapAB else 32

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
        _, causal, dtype, size, ratio = key
        plan = self.plan(size, causal)
        return self._backward_kernel(
            self.interface.torch2cute_dtype_map[dtype],
            size,
            size,
            ratio,
            is_causal=causal,
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

    def plan(self, size: int, causal: bool = False) -> Any:
        """The package's block sizes for a backward; those of keys do not depend on `causal`."""
        return self.interface._tile_size_bwd_sm90(size, size, causal, False)


class Queries:
    """The backward of tiles of one kind that share their queries: `add` for each, then `dq` once."""

    def __init__(
        self, launcher: Launcher, dout_TNH: Tensor, q_TNH: Tensor, out_TNH: Tensor, lse_TN: Tensor, causal: bool, scale: float
    ) -> None:
        self._launcher, self._causal, self._scale = launcher, causal, scale
        self._q, self._dout = q_TNH.unsqueeze(0), dout_TNH.unsqueeze(0)
        tokens, heads, size = q_TNH.shape
        rows = _up(tokens, launcher.plan(size, causal).m_block_size)
        self._delta, self._lse_log2 = (lse_TN.new_empty((1, heads, rows)) for _ in range(2))
        self._dq_sum = lse_TN.new_empty((1, heads, rows * _up(size, launcher.multiple(size))))
        into = self._delta, self._lse_log2, self._dq_sum
        launcher.preprocess(out_TNH.unsqueeze(0), self._dout, lse_TN.transpose(0, 1).unsqueeze(0), into, causal)

    def add(self, k_SMH: Tensor, v_SMH: Tensor, dk: Tensor, dv: Tensor) -> None:
        """A tile's dq to the sum; (dk, dv) are added to sums [M, X], or [S, M, H] is filled."""
        ours = self._q, k_SMH.unsqueeze(0), v_SMH.unsqueeze(0), self._dout, self._lse_log2, self._delta, self._dq_sum
        self._launcher.backward((*ours, dk.unsqueeze(0), dv.unsqueeze(0)), self._causal, self._scale)

    def dq(self) -> Tensor:
        """[T, N, H], q's dtype."""
        dq = self._q.new_empty(self._q.shape)
        self._launcher.finish_dq(self._dq_sum, dq, self._causal, self._scale)
        return dq.squeeze(0)


class HopperSums(PlainSums):
    """`Sums` that the kernel adds to. Where heads are shared, (dk, dv) are [2, M, X] in the kernel's own order, else plain.

    What the launcher does not take goes to `backward`. All queries' sums are begun at once, so that tiles may then run
    side by side.
    """

    def __init__(
        self,
        launcher: Launcher,
        backward: Backward,
        dout_TNH: Tensor,
        q_TNH: Tensor,
        out_TNH: Tensor,
        lse_TN: Tensor,
        kv_heads: int,
        tiles: Sequence[Tile],
        score: Any,
    ) -> None:
        super().__init__(backward, dout_TNH, q_TNH, out_TNH, lse_TN, kv_heads, score)
        self._scale, scale = score.scale, score.scale
        self._launcher, self._shared = launcher, kv_heads != q_TNH.shape[1]
        self._block, self._elements = launcher.plan(q_TNH.shape[2]).n_block_size, launcher.block_elements(q_TNH.shape[2])
        self._place = launcher.place(q_TNH) if self._shared else None
        self._own: tuple[Tensor, Tensor] | None = (
            None  # of the own documents; waits for the sums to come home, which are those keys'
        )
        self._queries: dict[tuple, Queries] = {}
        for tile in filter(launchable, tiles):
            part = slice(tile.q_start, tile.q_end)
            if _kind(tile) not in self._queries:
                given = dout_TNH[part], q_TNH[part], out_TNH[part], lse_TN[part], tile.causal, scale
                self._queries[_kind(tile)] = Queries(launcher, *given)

    def new(self, keys: int, starts: Sequence[Sequence[int]] = (ONE_RUN,)) -> Tensor:
        if not self._shared:
            return self.plain(keys)
        blocks = max(blocked.blocks(runs, keys, self._block) for runs in starts)
        return self._q.new_zeros((2, self._kv_heads, blocks * self._elements), dtype=self.work)

    def add(self, into: Tensor, tile: Tile, k_SMH: Tensor, v_SMH: Tensor, starts: Sequence[int] = ONE_RUN) -> None:
        keys = slice(tile.k_start, tile.k_end)
        k, v = k_SMH[keys], v_SMH[keys]
        if not launchable(tile):
            dkv = self.outside(tile, k, v)
            if into.ndim == 3 and tile.causal:
                self._own = dkv
            else:
                self._outside_add(into, tile, *dkv, starts)
            return
        first = blocked.first_block(tile.k_start, tile.k_end, starts, self._block) if into.ndim == 3 else None
        if first is not None:
            dk, dv = into[:, :, first * self._elements : (first + -(-len(k) // self._block)) * self._elements]
            self._queries[_kind(tile)].add(k, v, dk, dv)
        else:
            dk, dv = self._alone(tile, k, v)
            self._outside_add(into, tile, dk, dv, starts)
        if tile.causal:  # no other has its kind
            self.add_dq(tile.q_start, self._queries.pop(_kind(tile)).dq())

    def _outside_add(self, into: Tensor, tile: Tile, dk_SMH: Tensor, dv_SMH: Tensor, starts: Sequence[int]) -> None:
        if into.ndim == 3:
            assert self._place is not None
            form = self._place, self._elements, starts
            blocked.add_(into, *form, tile.k_start, dk_SMH, dv_SMH, 1 / self._scale)
        else:
            self.add_plain(into, tile, dk_SMH, dv_SMH)

    def _alone(self, tile: Tile, k: Tensor, v: Tensor) -> Tensor:
        """(dk, dv) [2, S, M, H] of a tile in tensors of its own."""
        dkv = torch.empty((2, *k.shape), dtype=k.dtype, device=k.device)
        sums = self.new(len(k)) if self._shared else dkv
        self._queries[_kind(tile)].add(k, v, *sums)
        if self._shared:
            for part, into, factor in zip(sums, dkv, (self._scale, 1.0), strict=True):
                self._launcher.finish_dkv(part.unsqueeze(0), into.unsqueeze(0), factor)
        return dkv

    def dq(self) -> Tensor:
        while self._queries:  # one sum in fp32 after another gives way
            (start, *_), queries = self._queries.popitem()
            self.add_dq(start, queries.dq())
        return super().dq()

    def dkv(self, sums: Sequence[Tensor], keys: int, dtype: torch.dtype, starts: Sequence[int] = ONE_RUN) -> Tensor:
        if sums[0].ndim == 4:
            return super().dkv(sums, keys, dtype)
        assert self._place is not None
        own, self._own = self._own, None
        return blocked.plain(sums, self._place, self._elements, starts, keys, self._scale, dtype, own)


def launchable(tile: Tile) -> bool:
    """Whether a tile's backward goes past the front end."""
    one = tile.documents is None or len(tile.documents) == 2
    return one and tile.window is None and min(tile.q_end - tile.q_start, tile.k_end - tile.k_start) >= FEWEST_TOKENS


def _kind(tile: Tile) -> tuple[int, int, bool]:
    return tile.q_start, tile.q_end, tile.causal


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple

"""Affine maps of a state, S <- M S + N, composed: over the segments of a row on one device, and over ranks.

    (N, M)_later after (N, M)_earlier = (M_later N_earlier + N_later, M_later M_earlier)

is associative, so all prefixes of P maps take log2 P rounds of batched products (Hillis and Steele, 1986). A map with M = 0 forgets
what was before it: that is how a document begins.

Shapes: P maps in order, V heads, H x G the state's sizes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def prefixes(n_PVHG: Tensor, m_PVHH: Tensor) -> tuple[Tensor, Tensor]:
    """(N, M) of every map after all those before it."""
    step = 1
    while step < len(n_PVHG):
        m_later = m_PVHH[step:]
        n_later = n_PVHG[step:] + m_later @ n_PVHG[:-step]
        n_PVHG = torch.cat([n_PVHG[:step], n_later])
        m_PVHH = torch.cat([m_PVHH[:step], m_later @ m_PVHH[:-step]])
        step *= 2
    return n_PVHG, m_PVHH


def final(n_PVHG: Tensor, m_PVHH: Tensor) -> Tensor:
    """The state after all maps, one after another from 0; without any an empty sum, which keeps its place in the graph."""
    state = n_PVHG[:0].sum(0)
    for n, m in zip(n_PVHG, m_PVHH, strict=True):
        state = n + m @ state
    return state


def cut(documents: tuple[int, ...], tokens: int, multiple: int) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """(cu_seqlens of segments, whether each goes on where the one before it stopped).

    Every document is cut into equal parts of at most `tokens`, each but the last a multiple of `multiple`.
    """
    bounds, continues = [0], []
    for start, end in pairwise(documents):
        parts = -(-(end - start) // tokens)
        part = -(-(end - start) // (parts * multiple)) * multiple
        inside = range(start, end, part)
        bounds += [*inside[1:], end]
        continues += [index > 0 for index in range(len(inside))]
    return tuple(bounds), tuple(continues)

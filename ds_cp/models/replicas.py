"""What one replica has found in its row, told to all: one that raised by itself would leave the others in ZeRO's collectives."""

from __future__ import annotations

import torch

from ds_cp import comm
from ds_cp.mesh import Mesh


def any_replica(here: bool, reason: ValueError | None, mesh: Mesh, device: torch.device) -> bool:
    """Whether it is so in any replica; every rank of the job must call it, alike on all ranks of a row. The host waits for it.

    Raises:
        ValueError: `reason`, or that another replica has one.
    """
    flags = torch.tensor([float(here), float(reason is not None)], device=device)
    found, refused = comm.all_sum(flags, mesh.data.group).tolist() if mesh.data.size > 1 else flags.tolist()
    if reason is not None:
        raise reason
    if refused:
        raise ValueError("batch: the row of another replica was refused; its ranks say why")
    return bool(found)

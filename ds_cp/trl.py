"""TRL's trainers over shared rows, under TRL's names: `from ds_cp.trl import SFTTrainer` where `from trl import SFTTrainer` stood.

Needs trl (`pip install ds_cp[trl]`); nothing else of ds_cp imports this module. What is exact and what is refused: docs/trl.md.
"""

from __future__ import annotations

import trl

from ds_cp.trainer import TrainerMixin


class SFTTrainer(TrainerMixin, trl.SFTTrainer):
    """`trl.SFTTrainer` whose rows may be longer than one GPU."""


class DPOTrainer(TrainerMixin, trl.DPOTrainer):
    """`trl.DPOTrainer` whose rows may be longer than one GPU."""


class GRPOTrainer(TrainerMixin, trl.GRPOTrainer):
    """`trl.GRPOTrainer` whose rows may be longer than one GPU; every rank generates with the unsharded model."""

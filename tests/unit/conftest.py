"""Hypothesis draws the same examples on every machine: what is red for one is red for all, and no database is written."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("ds_cp", derandomize=True, deadline=None, database=None, print_blob=False)
settings.load_profile("ds_cp")

"""Ports for the jobs that tests start.

A port that bind(0) has found free may be taken again before the ranks are up: pytest processes beside each other open thousands of
connections, and the system gives those the same ports. Those here are below its range, and each is given once.
"""

from __future__ import annotations

import itertools
import os
import socket

FIRST, EACH = 14000, 2000
"""Of the first pytest process beside others (pytest-xdist's gw0), and how many each has."""
NUMBERS = itertools.count(os.getpid())  # two runs on one machine begin elsewhere


def free_port() -> int:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    for number in NUMBERS:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", FIRST + worker * EACH + number % EACH))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise AssertionError("unreachable: the numbers have no end")

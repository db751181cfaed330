"""Where every rank is, which of them have gone silent, and the line that a run ends with.

Each rank has a thread that beats into a TCPStore of rank 0 and looks at its neighbour's beats there, so W ranks look at W beats,
not W x W. What it finds:

- a rank has failed (`failed` is set, by its uncaught exception or by a neighbour to whom it went silent): whoever is then stuck in
  a collective for `grace_s` more ends itself. NCCL by itself would wait for its timeout, half an hour;
- NCCL has given up a collective (`Posted.lost`): where gloo raises, it writes to its log and takes the process down a minute later.
  The rank asks who is behind, says so and ends itself;
- somebody asks who is there (`asked`): it answers with where its rank is and how many collectives it has posted, so that the line
  can name who did not, and who is behind.

`stop_at` is the step after which all ranks stop together once one of them was told to by SIGTERM: a rank that has finished step k
puts k + 1 there before it takes part in step k + 1, and no rank can finish that step without it.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from operator import attrgetter, methodcaller
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

BEAT_S = 2.0
SILENT_S = 300.0
GRACE_S = 30.0
ANSWER_S = 3 * BEAT_S
ANSWER_TURNS = 12
LAST_WORDS_S = 2 * BEAT_S + ANSWER_S + 5 * BEAT_S
"""What a rank that has failed takes at most to tell the others and to ask who is there."""
STORE_S = 10.0
"""For one answer of the store."""
CONNECT = timedelta(seconds=60)
OUTSIDE = ("start", "after the step", "save", "evaluation")
"""Phases in which a rank need not be waiting for others."""


class Posted:
    """What this process has posted to its process groups, DeepSpeed's and the user's among them."""

    def count(self) -> int:
        """Collectives since the start, hops left out."""
        return sum(_asked_of(group, methodcaller("_get_sequence_number_for_group"), 0) for group in _groups())

    def lost(self) -> str | None:
        """What NCCL has given up, if anything."""
        for group in _groups():
            error = _asked_of(group, _nccl_error, "SUCCESS")
            if error != "SUCCESS":
                what = "was not done in time" if error == "TIMEOUT" else "failed"
                return f"a collective of its group of {group.size()} ranks {what}"
        return None


def _nccl_error(group: dist.ProcessGroup) -> str:
    if "nccl" not in dist.get_backend(group):
        return "SUCCESS"
    return group._get_backend(torch.device("cuda")).get_error().name


def _asked_of(group: dist.ProcessGroup, question: Callable[[dist.ProcessGroup], Any], unknown: Any) -> Any:
    """The main thread may be destroying the group, and not every backend knows an answer."""
    try:
        return question(group)
    except (AttributeError, RuntimeError, ValueError):
        return unknown


def _groups() -> list[dist.ProcessGroup]:
    """Every process group; PyTorch keeps them in no public place."""
    return list(dist.distributed_c10d._world.pg_map)


class Watch:
    """One rank's; made by `begin`. `step` counts finished optimizer steps."""

    def __init__(
        self, store: dist.Store, rank: int, hosts: Sequence[str], silent_s: float = SILENT_S, grace_s: float = GRACE_S
    ) -> None:
        self.rank, self.hosts, self.posted = rank, tuple(hosts), Posted()
        self.step: Callable[[], int] = int
        self._store, self._silent_s, self._grace_s = store, silent_s, grace_s
        self._phase, self._since, self._begun = "start", time.monotonic(), 0
        self._neighbour, self._answered, self._told = ("", time.monotonic()), 0, False
        self._reached = True  # the store, when it was last told something
        self._ended = threading.Event()
        self._thread = threading.Thread(target=_loop, args=(weakref.ref(self), self._ended), daemon=True, name="ds_cp watch")
        self._thread.start()

    def follow(self, owner: object, attribute: str) -> None:
        """Takes the number of finished steps from `owner`, which it does not keep alive."""
        here, read = weakref.ref(owner), attrgetter(attribute)
        self.step = lambda: 0 if here() is None else read(here())

    def enter(self, phase: str) -> None:
        self._phase, self._since, self._begun = phase, time.monotonic(), self.step()

    def place(self) -> str:
        """ "step 17, backward": the step that it is in, from 1."""
        where = self._where()
        return f"step {self.step() if where in ('after the step', 'save') else self._begun + 1}, {where}"

    def _where(self) -> str:
        return "after the step" if self._phase == "backward" and self.step() > self._begun else self._phase

    def _outside(self) -> bool:
        return self._where() in OUTSIDE

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    def end(self) -> None:
        """This rank goes on without being watched; its neighbour no longer waits for its beats."""
        self._ended.set()
        self._thread.join(STORE_S)
        if not self._thread.is_alive():  # else its store does not answer
            _quietly(self._store.set, f"beat/{self.rank}", "end")

    def failed(self, reason: str) -> str:
        """Tells all ranks and returns the line; what others know about who is there comes after it, if it can be had."""
        line = f"ds_cp: {self.name(self.rank)} stopped in {self.place()}: {reason}"
        self._since = time.monotonic()  # from now on it has its time to end
        self._reached = _within(2 * BEAT_S, lambda: self._store.compare_set("failed", "", line))
        return line

    def roll_call(self) -> str:
        """Who does not answer, and who is somewhere else; "" if nothing can be found out."""
        found: list[str] = []
        if not self._reached and self.rank:
            return f"no answer from {self.name(0)}"

        def ask() -> None:
            asked = self._store.add("asked", 1)
            for _ in range(ANSWER_TURNS):  # others may ask at the same time, and this may be the thread that answers them
                time.sleep(ANSWER_S / ANSWER_TURNS)
                self._answer()
            others = [rank for rank in range(len(self.hosts)) if rank != self.rank]
            there = {rank for rank in others if self._store.check([f"here/{asked}/{rank}"])}
            gone = [self.name(rank) for rank in others if rank not in there]
            found.extend(["no answer from " + ", ".join(gone[:8])] if gone else [])
            answers = {rank: self._store.get(f"here/{asked}/{rank}").decode().split("\n") for rank in sorted(there)[:64]}
            elsewhere = [f"{self.name(rank)} is in {place}" for rank, (place, _) in answers.items() if place != self.place()]
            posted = {self.rank: self.posted.count()} | {rank: int(count) for rank, (_, count) in answers.items()}
            behind = [self.name(rank) for rank, count in posted.items() if count < max(posted.values())]
            found.extend(elsewhere[:4])
            found.extend(["fewer collectives than others have posted " + ", ".join(behind[:4])] if behind else [])

        if not _within(ANSWER_S + 5 * BEAT_S, ask) and self.rank:
            found.append(f"no answer from {self.name(0)}")
        return "; ".join(found)

    def stop_after(self, step: int, told: bool) -> bool:
        """Whether all ranks stop now that `step` is finished; every rank must ask after every step. A round trip to rank 0's host.

        Args:
            told: this rank was told to stop.
        """
        if told and not self._told:
            self._told = True
            self._store.compare_set("stop_at", "", str(step + 1))
        return self._store.check(["stop_at"]) and int(self._store.get("stop_at")) <= step

    def look(self) -> str | None:
        """One turn of the thread; the line to end with, if this rank must end."""
        try:
            self._store.set(f"beat/{self.rank}", str(time.monotonic()))
            self._answer()
            failure = self._failure()
        except RuntimeError as error:
            failure = f"{self.name(0)} does not answer ({str(error).splitlines()[0][:80]})"
        lost = self.posted.lost()
        if lost is not None and failure is None:
            failure = self._give_up(lost)
        if failure is None:
            return None
        me = self.name(self.rank)
        mine = failure.startswith(f"{me} stopped")
        patience = max(self._grace_s, LAST_WORDS_S) if mine else self._grace_s
        if lost is None and (self._outside() or time.monotonic() - self._since < patience):
            return None
        if mine:  # NCCL waits at the end of a process for what the others left
            return f"ds_cp: {me} has not ended since, and is ended"
        return f"ds_cp: {me} waited in {self.place()} for others and ends: {failure}"

    def _give_up(self, lost: str) -> str:
        """Tells all ranks what NCCL has given up here, with what they know of it."""
        known = self.roll_call()
        reason = f"{lost}{'; ' * bool(known)}{known}"
        _quietly(self._store.compare_set, "failed", "", f"{self.name(self.rank)} waited in {self.place()}: {reason}")
        return reason

    def _answer(self) -> None:
        asked = self._store.add("asked", 0)
        for number in range(self._answered + 1, asked + 1):
            self._store.set(f"here/{number}/{self.rank}", f"{self.place()}\n{self.posted.count()}")
        self._answered = asked

    def _failure(self) -> str | None:
        if self._store.check(["failed"]):
            return self._store.get("failed").decode().removeprefix("ds_cp: ")
        other, now = (self.rank + 1) % len(self.hosts), time.monotonic()
        beat = self._store.get(f"beat/{other}").decode() if self._store.check([f"beat/{other}"]) else ""
        if beat != self._neighbour[0]:
            self._neighbour = beat, now
        silent = now - self._neighbour[1]
        if silent < self._silent_s or beat == "end" or self._outside():
            return None
        reason = f"no sign of life from {self.name(other)} for {silent:.0f} s"
        self._store.compare_set("failed", "", reason)
        return reason


def begin(silent_s: float = SILENT_S, grace_s: float = GRACE_S) -> Watch:
    """The watch of this rank; every rank of the job must call it. Its port is one that the system chose on rank 0's host."""
    rank, world = dist.get_rank(), dist.get_world_size()
    server = os.environ.get("MASTER_ADDR", "127.0.0.1")
    store = dist.TCPStore(server, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    everyone: list[tuple[str, int]] = [("", 0)] * world
    dist.all_gather_object(everyone, (socket.gethostname(), store.port if store is not None else 0))
    if store is None:
        store = dist.TCPStore(server, everyone[0][1], is_master=False, timeout=CONNECT, wait_for_workers=False)
    dist.barrier()  # rank 0 may be done, and its store gone, before others have reached it
    store.set_timeout(timedelta(seconds=STORE_S))
    watch = Watch(store, rank, [host for host, _ in everyone], silent_s, grace_s)
    here = weakref.ref(watch)
    _say_at_the_end(here)
    atexit.register(_end, here)
    return watch


class Preemption:
    """SIGTERM as a wish that the next look at `told` finds; the second one ends the process as ever."""

    def __init__(self) -> None:
        self.told = False
        self._before = signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        self.told = True
        self.restore()

    def restore(self) -> None:
        signal.signal(signal.SIGTERM, self._before)


def _say_at_the_end(watch: weakref.ref[Watch]) -> None:
    """An exception that nobody catches ends with the watch's line, after its traceback."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        here = watch()
        if here is None or issubclass(kind, KeyboardInterrupt):
            return
        message = str(error).strip().splitlines() or [""]
        print(here.failed(f"{kind.__name__}: {message[0]}"), file=sys.stderr, flush=True)
        known = here.roll_call()
        if known:
            print(f"ds_cp: seen from {here.name(here.rank)}: {known}", file=sys.stderr, flush=True)

    sys.excepthook = hook


def _end(watch: weakref.ref[Watch]) -> None:
    """Before the interpreter ends: a thread that comes back from the store then aborts a run that had succeeded."""
    here = watch()
    if here is not None:
        here.end()


def _loop(watch: weakref.ref[Watch], ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        here = watch()
        if here is None:
            return
        line = here.look()
        if line is not None and not ended.is_set():
            print(line, file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(1)
        del here


def _within(seconds: float, work: Callable[[], object]) -> bool:
    """Whether `work` was done in time: a store whose host is cut off never answers."""
    done = threading.Event()

    def run() -> None:
        _quietly(work)
        done.set()

    threading.Thread(target=run, daemon=True).start()
    return done.wait(seconds)


def _quietly(work: Callable[..., object], *args: object) -> None:
    try:
        work(*args)
    except RuntimeError:  # rank 0 is gone, and its store with it
        return

"""Processes that are forked from one which has the slow imports done: what a test starts by itself begins at once.

    python -m tests.warm SOCKET     # the server; `Warm` starts it

A child leaves the server's loop for the top of the interpreter and runs its program there as `python -m module` or `python file.py`
does, with arguments, log and environment of its own. So it ends as any process does: excepthook, atexit, signals, exit code. What
launchers start is not forked.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

from tests.ports import free_port

ROOT = Path(__file__).parents[1]
PRELOADED = "tests.dist.preloaded"
START_S = 180
TURN_S = 0.02


class Started:
    """One child, with the part of subprocess.Popen that tests use."""

    def __init__(self, server: Warm, pid: int) -> None:
        self._server, self.pid, self.returncode = server, pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.code(self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(TURN_S)
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


class Warm:
    """The server's side of a test.

    `prefix` is a command that starts it somewhere else, on a host of `scripts/hosts`; `environment` is for what is read in imports.
    """

    def __init__(self, folder: Path, prefix: Sequence[str | Path] = (), environment: Mapping[str, str] | None = None) -> None:
        self._codes: dict[int, int] = {}
        address, log = folder / "socket", folder / "server.log"
        command = [*prefix, sys.executable, "-m", "tests.warm", address]
        with open(log, "w") as file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            self._process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(environment or {})}, **streams)
        deadline = time.monotonic() + START_S
        while True:
            try:
                self._connection = connection.Client(str(address))
                break
            except (FileNotFoundError, ConnectionRefusedError):  # it is not there, or does not listen yet
                assert self._process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(TURN_S)

    def start(self, program: str | Path, *arguments: object, log: Path, environment: Mapping[str, str]) -> Started:
        log.touch()  # who reads it need not wait for the child
        self._connection.send((str(program), [str(argument) for argument in arguments], str(log), dict(environment)))
        while True:
            pid, code = self._connection.recv()
            if code is None:
                return Started(self, pid)
            self._codes[pid] = code

    def run(self, program: str | Path, *arguments: object, folder: Path, ranks: int = 0, timeout: float, **more: str) -> str:
        """What the first of the ranks said, once all have ended without an error; ranks 0 is one process of no group.

        Ranks get the variables that DeepSpeed's launcher gives them; where the launcher itself matters, start it.
        """
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        own = [{**shared, "RANK": str(i), "LOCAL_RANK": str(i), "LOCAL_WORLD_SIZE": str(ranks)} for i in range(ranks)] or [{}]
        logs = [folder / f"rank{i}.log" for i in range(len(own))]
        started = [
            self.start(program, *arguments, log=log, environment={**variables, **more})
            for log, variables in zip(logs, own, strict=True)
        ]
        deadline = time.monotonic() + timeout
        try:
            codes = [process.wait(deadline - time.monotonic()) for process in started]
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
        said = [log.read_text(errors="replace") for log in logs]
        assert not any(codes), said[next(i for i, code in enumerate(codes) if code)][-6000:]
        return said[0]

    def code(self, pid: int) -> int | None:
        while self._connection.poll():
            ended, code = self._connection.recv()
            self._codes[ended] = code
        return self._codes.pop(pid, None)  # its number may be given again

    def close(self) -> None:
        self._connection.close()
        self._process.wait(START_S)


def serve(here: connection.Connection) -> tuple[str, list[str], str, dict[str, str]]:
    """What to run, in a child; the server itself does not return."""
    alive: set[int] = set()
    while True:
        if here.poll(TURN_S):
            try:
                wanted: Any = here.recv()
            except EOFError:  # the test has closed its end
                os._exit(0)
            pid = os.fork()
            if pid == 0:
                here.close()
                return wanted
            alive.add(pid)
            here.send((pid, None))
        while alive:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            alive.remove(pid)
            here.send((pid, os.waitstatus_to_exitcode(status)))


def main(address: str) -> None:
    importlib.import_module(PRELOADED)
    with connection.Listener(address) as listener:
        here = listener.accept()
    program, arguments, log, environment = serve(here)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
    os.environ |= environment
    sys.argv[1:] = arguments
    if program.endswith(".py"):
        sys.argv[0], sys.path[0] = program, str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1])

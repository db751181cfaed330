"""A program that stands for Python: what it runs is forked from a process that has the slow imports done.

    FOLDER/python [-X OPTION] PROGRAM ARGUMENT ...     # or -m MODULE, or -c CODE; `Interpreter` writes it
    python -m tests.interpreter FOLDER                 # the server, which `Interpreter` starts

For scripts that start processes, which they do by `sys.executable`: that is FOLDER/python in what is forked, too. Such a process
has the arguments, folder, environment, open files and namespaces (a host's of scripts/hosts) of the program that asked for it,
and is killed with it.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.warm import PRELOADED, ROOT, START_S, TURN_S

CLIENT = """#!{python} -IS
import json, os, signal, socket, struct, sys
there = socket.socket(socket.AF_UNIX)
there.connect({address!r})
asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(there, [struct.pack("!I", len(asked))], [0, 1, 2])
there.sendall(asked)
code = int(there.recv(16) or 1)
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


class Interpreter:
    """The server's side of a test; `path` is the program."""

    def __init__(self, folder: Path) -> None:
        self.path, log = folder / "python", folder / "server.log"
        with open(log, "w") as file:
            command = [sys.executable, "-m", "tests.interpreter", str(folder)]
            self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=file, stderr=file)
        deadline = time.monotonic() + START_S
        while not self.path.exists():
            assert self._process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(TURN_S)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(START_S)


def serve(listener: socket.socket) -> tuple[list[str], str, dict[str, str], list[int]]:
    """What to run, in a child; the server itself does not return."""
    alive: dict[int, socket.socket] = {}
    while True:
        for ready in select.select([sys.stdin, listener, *alive.values()], [], [], TURN_S)[0]:
            if ready is sys.stdin:  # the test has closed its end
                os._exit(0)
            if ready is listener:
                here = listener.accept()[0]
                size, descriptors, *_ = socket.recv_fds(here, 4, 3)
                asked = here.makefile("rb").read(struct.unpack("!I", size)[0])  # whole: after it comes nothing but the end
                pid = os.fork()
                if pid == 0:
                    join(struct.unpack("3i", here.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
                    for each in (listener, here, *alive.values()):
                        each.close()
                    return *json.loads(asked), descriptors
                alive[pid] = here
                for descriptor in descriptors:
                    os.close(descriptor)
            else:  # who asked for it is gone
                os.kill(next(pid for pid, here in alive.items() if here is ready), signal.SIGKILL)
        while alive:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            here = alive.pop(pid)
            with here:
                answer(here, os.waitstatus_to_exitcode(status))


def join(pid: int) -> None:
    """Enters the namespaces of a process, where they are others than those here."""
    for kind in ("net", "uts", "mnt"):
        path = f"/proc/{pid}/ns/{kind}"
        if os.readlink(path) != os.readlink(f"/proc/self/ns/{kind}"):
            namespace = os.open(path, os.O_RDONLY)
            assert ctypes.CDLL(None).setns(namespace, 0) == 0, path
            os.close(namespace)


def answer(here: socket.socket, code: int) -> None:
    try:
        here.sendall(str(code).encode())
    except BrokenPipeError:
        return


def run(arguments: list[str], folder: str, environment: dict[str, str], descriptors: list[int], python: str) -> None:
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ |= environment
    os.chdir(folder)
    sys.executable = python
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    while arguments[0] == "-X":
        del arguments[:2]
    how = arguments.pop(0) if arguments[0] in ("-m", "-c") else ""
    what: Any = arguments[0]
    sys.argv[:] = arguments
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif how == "-c":
        exec(what, {"__name__": "__main__"})
    else:
        sys.path.insert(0, str(Path(what).resolve().parent))
        runpy.run_path(what, run_name="__main__")


def main(folder: Path) -> None:
    importlib.import_module(PRELOADED)
    address, program = str(folder / "socket"), folder / "python"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    written = folder / "python.new"
    written.write_text(CLIENT.format(python=sys.executable, address=address))
    written.chmod(0o755)
    written.rename(program)
    asked = serve(listener)
    code = 1
    try:
        run(*asked, python=str(program))
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an interpreter's own end visits every object of the imports, and so copies them: half a second


if __name__ == "__main__":
    main(Path(sys.argv[1]))

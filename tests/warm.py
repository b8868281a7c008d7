"""Processes that need not import first: a server has imported everything once, and forks one for each command.

A start with all libraries costs a second of a core, a fork some hundredths of one. What runs is the same code, in a
process of its own with its own arguments, environment, folder, umask, cores and streams, and it ends as Python ends.
Where the start itself is the point (an import, what exec hands on, the first signal), a test starts it for real; so
does `start` where the environment says what libraries read when they are imported.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, TextIO

# What is imported in advance, as code. Of the runtime: all modules, and what they import only when they are called.
RUNTIME: Final = """
import contextlib, importlib, pkgutil, mtdp_runtime, typer.main
from mtdp_runtime.backends.telemetry import import_openvino
import_openvino()
rooms = pkgutil.walk_packages(mtdp_runtime.__path__, "mtdp_runtime.")
modules = [room.name for room in rooms if not room.name.endswith("__main__")]
for name in (*modules, "cuda.bindings.runtime", "numpy.ma", "onnxruntime", "pydantic.type_adapter", "typer._adapters"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
typer.main.get_command(mtdp_runtime.commands.extract.app)
"""
TRAINING: Final = """
import os
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # of pyarrow, which scikit-learn imports
import mtdp.cli, mtdp.pretrain, mtdp.protocol.run, mtdp.transfer, mtdp.bundle_features, timm
"""
_SERVER: Final = """
import sys
sys.path.append(sys.argv[1])
import warm
sys.path.pop()
try:
    exec(warm.serve(int(sys.argv[2]), sys.argv[3]))
    warm.leave(0)
except SystemExit as end:
    warm.leave(0 if end.code is None else end.code)
    raise
"""
# What Python and libraries read once, when they start: whoever changes it gets a real start. (cv2 and scikit-learn set
# LD_LIBRARY_PATH and KMP_* when they are imported, wherever that is: these are none of it.)
_READ_EARLY: Final = ("HDF5_", "LANG", "LC_", "LD_PRELOAD", "MALLOC_", "OMP_", "OPENBLAS_", "PYTHON", "TZ")
_MOST_BYTES: Final = 1 << 20


def _read_early(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_READ_EARLY)}


_AT_START: Final = _read_early(os.environ)


class Process:
    """A running command, with the methods of a `subprocess.Popen` of text."""

    def __init__(self, args: list[str], reply: socket.socket, stdout: IO[str] | None, stderr: IO[str] | None) -> None:
        self.args, self.stdout, self.stderr = args, stdout, stderr
        self.returncode: int | None = None
        self._reply = reply
        self.pid = self._told()

    def _told(self) -> int:
        told = self._reply.recv(64)
        assert told, "the server of warm processes is gone"
        return int(told)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, or minus the number of the signal that ended it."""
        if self.returncode is None:
            if not select.select([self._reply], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.returncode = os.waitstatus_to_exitcode(self._told())
            self._reply.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        try:
            return self.wait(0.0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read the streams to their ends, and wait for the process's."""
        said = ["", ""]

        def read(number: int, stream: IO[str]) -> None:
            with stream:
                said[number] = stream.read()

        streams = [(number, one) for number, one in enumerate((self.stdout, self.stderr)) if one and not one.closed]
        readers = [threading.Thread(target=read, args=one, daemon=True) for one in streams]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return said[0], said[1]


@dataclass(frozen=True)
class _Server:
    """The client's side of a server."""

    process: subprocess.Popen[bytes]
    control: socket.socket


_SERVERS: Final[dict[str, _Server]] = {}


def _server(imports: str) -> _Server:
    if imports not in _SERVERS:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-c", _SERVER, str(Path(__file__).parent), str(theirs.fileno()), imports]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_READ_EARLY)}
        with theirs:
            process = subprocess.Popen(command, env=environment | _AT_START, pass_fds=[theirs.fileno()])
        _SERVERS[imports] = _Server(process, ours)
        if not ours.recv(1):
            stop()
            raise RuntimeError("the server of warm processes did not start: see its traceback")
    return _SERVERS[imports]


def stop() -> None:
    """End all servers."""
    while _SERVERS:
        _, server = _SERVERS.popitem()
        server.control.close()
        server.process.wait()


def start(
    code: str,
    *arguments: object,
    streams: tuple[int, int, int] = (0, subprocess.PIPE, subprocess.PIPE),
    env: Mapping[str, str] | None = None,
    imports: str = RUNTIME,
) -> Process | subprocess.Popen[str]:
    """Run `python -c code arguments...`; a stream is a descriptor or, for the last two, a pipe."""
    environment = dict(os.environ if env is None else env)
    args = ["-c", code, *map(str, arguments)]
    if _read_early(environment) != _AT_START:
        named = dict(zip(("stdin", "stdout", "stderr"), streams, strict=True))
        return subprocess.Popen([sys.executable, *args], **named, env=environment, text=True)
    server = _server(imports)
    pipes = [os.pipe() if one == subprocess.PIPE else None for one in streams]
    theirs = [pipe[1] if pipe else one for pipe, one in zip(pipes, streams, strict=True)]
    reply, answering = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.umask(umask := os.umask(0o22))
    cores = sorted(os.sched_getaffinity(0))
    asked = {"args": args, "env": environment, "cwd": os.getcwd(), "umask": umask, "cores": cores}  # noqa: PTH109
    with answering:
        socket.send_fds(server.control, [json.dumps(asked).encode()], [*theirs, answering.fileno()])
    for pipe in pipes:
        if pipe:
            os.close(pipe[1])
    ends = [os.fdopen(pipe[0], errors="surrogateescape") if pipe else None for pipe in pipes[1:]]
    return Process(args, reply, *ends)


def run(
    code: str, *arguments: object, env: Mapping[str, str] | None = None, imports: str = RUNTIME
) -> subprocess.CompletedProcess[str]:
    """Run `python -c code arguments...` to its end."""
    process = start(code, *arguments, env=env, imports=imports)
    stdout, stderr = process.communicate()
    return subprocess.CompletedProcess(process.args, process.wait(), stdout, stderr)


def serve(number: int, imports: str) -> str:
    """Import, then fork a process for each message on a socket; return in each of them the code that it is to run."""
    exec(imports, {})
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"a process with {threads} threads is not forked: what is imported in advance starts some"
    gc.collect()
    gc.freeze()  # collections of a child would copy what it shares with the server
    control = socket.socket(fileno=number)
    control.send(b"!")
    running: dict[int, tuple[int, socket.socket]] = {}  # a descriptor of the process: its number, and who waits for it
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the tests, and for what they run
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            if ready in running:
                poll.unregister(ready)
                pid, reply = running.pop(ready)
                _answer(reply, os.waitpid(pid, 0)[1])
                reply.close()
                os.close(ready)
                continue
            message, descriptors, _, _ = socket.recv_fds(control, _MOST_BYTES, 4)
            if not message:
                os._exit(0)  # the tests have ended
            reply = socket.socket(fileno=descriptors.pop())
            pid = os.fork()
            if pid == 0:
                for other in (control, reply, *(one for _, one in running.values())):
                    other.close()
                for other in running:
                    os.close(other)
                signal.signal(signal.SIGINT, heard)
                return _become(json.loads(message), descriptors)
            for one in descriptors:
                os.close(one)
            _answer(reply, pid)
            watched = os.pidfd_open(pid)
            running[watched] = pid, reply
            poll.register(watched, select.POLLIN)


def _answer(reply: socket.socket, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it
        reply.send(str(number).encode())


def _become(asked: dict[str, Any], descriptors: list[int]) -> str:
    """Make a forked process what `python -c` would be."""
    for number, one in enumerate(descriptors):
        os.dup2(one, number)
    for one in descriptors:
        os.close(one)
    chosen = {name: os.environ[name] for name in ("LC_CTYPE",) if name in os.environ}  # by Python, in place of C
    os.environ.clear()
    os.environ.update(chosen | asked["env"])
    os.chdir(asked["cwd"])
    os.umask(asked["umask"])
    os.sched_setaffinity(0, asked["cores"])
    _, code, *arguments = asked["args"]
    sys.argv[:] = ["-c", *arguments]
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = _stream(getattr(sys, name), mode)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    return code


def leave(code: object) -> None:
    """End a process without taking its modules apart; return from an unusual end, which is then Python's own.

    C's `exit` still does what libraries ask for at an end.
    """
    if isinstance(code, int) and threading.active_count() == 1:
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
            sys.stderr.flush()
            ctypes.PyDLL(None).exit(code)


def _stream(before: TextIO, mode: str) -> TextIO:
    """Open a standard stream as Python does at its start; the server's own remembers what its descriptor was."""
    number = before.fileno()
    raw, buffered = io.FileIO(number, mode, closefd=False), not getattr(before, "write_through", False)
    binary: Any = raw
    if buffered:
        binary = io.BufferedReader(raw) if mode == "r" else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        binary,
        before.encoding,
        before.errors,
        line_buffering=buffered and (number == 2 or raw.isatty()),
        write_through=not buffered,
    )

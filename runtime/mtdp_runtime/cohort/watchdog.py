"""A run that survives the death of its own process.

Decoders are native code, and a damaged or hostile slide can crash or hang them; nothing inside a process can help then.
So a small parent, which has loaded no library, forks the worker that does all the work, and waits. When the worker
dies, or neither reads nor computes anything for too long, the parent records the slide it was at as failed and forks
another worker, which goes on with the next. Who crashes is tried once more in a fresh worker first: a crash may come of
what an earlier slide left. A slide costs two lines through a pipe; only a crash costs a new start.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final

from mtdp_runtime.machine import die_with
from mtdp_runtime.printable import printable

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_BEAT_EVERY_S: Final = 1.0
_TICK_S: Final = 1.0
_GRACE_S: Final = 60.0  # from a signal to the end of what hangs
MOST_LOST_IN_A_ROW: Final = 10  # then it is not the slides
EXIT_FAILED: Final = 1
EXIT_REFUSED: Final = 2  # see commands/exit_codes.py
NO_SLIDE_HINT: Final = "mtdp-doctor tries the engines; --backend names another one."
LOADING_HINT: Final = (
    "Take models from people you trust; a large one may need a longer --stall-limit or another --backend."
)
# How a decoder dies of a file. SIGBUS is a disk that fails under a mapped file, SIGKILL most often the lack of memory.
CRASHES: Final = ("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE")


@dataclass(slots=True)
class Worker:
    """The worker's side: it tells the parent where it is."""

    settled: dict[str, dict[str, Any]]  # slide -> `run_log.counts` of it, of the workers before this one
    _pipe: int
    started: bool = False  # what is said before work starts was said by a worker before this one
    follows: bool = False  # a worker before this one began the work
    _beaten_s: float = 0.0

    def begin(self, slide: str, line: dict[str, Any], claim: str) -> None:
        """Name the slide that is begun: the line to record, and the claim to give back, should this process die.

        `claim` is empty where there is none.
        """
        self._tell({"begin": slide, "line": line, "claim": claim})

    def start(self) -> None:
        """Say that all was looked at beforehand, and work starts."""
        self.started = True
        self._tell({"start": True})

    def load(self, name: str) -> None:
        """Say that a model's engine is made and tried; empty: that all are there. That, too, may hang."""
        self._tell({"load": name})

    def beat(self) -> None:
        """Say that something was read or computed."""
        now = time.monotonic()
        if now - self._beaten_s > _BEAT_EVERY_S:
            self._beaten_s = now
            self._tell({})

    def end(self, slide: str, result: dict[str, Any] | None = None) -> None:
        """Say that a slide is left: with its result where it is settled, without where it was only looked at."""
        self._tell({"end": slide, "result": result})

    def _tell(self, what: dict[str, Any]) -> None:
        # One write, below PIPE_BUF for all but the longest names, so lines of several threads do not mix.
        with contextlib.suppress(OSError):
            os.write(self._pipe, json.dumps(what).encode() + b"\n")


class Unwatched(Worker):
    """A run in its caller's own process: nobody waits to hear how far it is."""

    def __init__(self) -> None:
        super().__init__({}, -1)

    def begin(self, slide: str, line: dict[str, Any], claim: str) -> None:
        """Tell nobody."""

    def start(self) -> None:
        """Tell nobody."""

    def load(self, name: str) -> None:
        """Tell nobody."""

    def beat(self) -> None:
        """Tell nobody."""

    def end(self, slide: str, result: dict[str, Any] | None = None) -> None:
        """Tell nobody."""


UNWATCHED: Final = Unwatched()


@dataclass(slots=True)
class _State:
    """The parent's side."""

    settled: dict[str, dict[str, Any]] = field(default_factory=dict)
    at: dict[str, Any] | None = None  # what the last `begin` said, until its `end`
    loads: str = ""  # the model that is loaded now
    started: bool = False
    stopped_by: int = 0
    stopped_s: float = 0.0
    crashed: set[str] = field(default_factory=set)  # slides at which a worker died once


def supervise(stall_limit_s: float, lost: Callable[[dict[str, Any]], None]) -> Worker:
    """Fork a worker and return in it. The parent never returns: it leaves with the worker's exit code.

    Call it before threads are started and heavy libraries are loaded.

    Args:
        stall_limit_s: seconds without a beat, while a slide is worked on or a model is loaded, after which the worker
            is ended; 0 = never.
        lost: called in the parent with the line of a slide whose worker died: `begin`'s, with status and message.

    Raises:
        SystemExit: in the parent.
    """
    state = _State()
    lost_in_a_row = 0
    while True:
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        reader, writer = os.pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            die_with(parent)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            return Worker(dict(state.settled), writer, state.started, state.started)
        os.close(writer)
        known = len(state.settled)
        code, why = _watch(pid, reader, stall_limit_s, state)
        if not why:
            sys.exit(code)
        if state.at is None:
            while_ = f"while it loaded the model {state.loads}" if state.loads else "while it worked on no slide"
            print(f"error: the process {why} {while_}", file=sys.stderr)
            print(f"hint: {LOADING_HINT if state.loads else NO_SLIDE_HINT}", file=sys.stderr)
            sys.exit(EXIT_REFUSED)
        slide, line, claim = state.at["begin"], state.at["line"], state.at["claim"]
        with contextlib.suppress(OSError):
            os.unlink(claim)  # noqa: PTH108  (this process loads nothing that it can do without)
        by_itself = any(name in why for name in CRASHES)
        if by_itself and slide not in state.crashed:  # what died may have been damaged by what came before
            state.crashed.add(slide)
            state.at = None
            continue
        line = lost_line(line, why, by_itself)
        lost(line)
        lost_in_a_row = lost_in_a_row + 1 if len(state.settled) == known else 1
        state.settled[slide] = {name: line[name] for name in ("status", "message", "hint")}
        state.at = None
        if lost_in_a_row >= MOST_LOST_IN_A_ROW:
            print(f"error: {lost_in_a_row} slides in a row ended the process: the run ends", file=sys.stderr)
            print("hint: mtdp-doctor tries the engines; see run.jsonl for each slide.", file=sys.stderr)
            sys.exit(EXIT_FAILED)


def lost_line(line: dict[str, Any], why: str, by_itself: bool) -> dict[str, Any]:
    """Return the line of a slide whose process is gone; `line` is what it would have been.

    Only where the process crashed `by_itself` is it the slide: memory, the disk or the model may end it, too.
    """
    message = f"{line['slide']}: the process {why} at this slide"
    line = {**line, "status": "failed", "message": message, "hint": _hint(why)}
    if not by_itself:
        line.pop("attempt", None)
    return line


def _hint(why: str) -> str:
    if "SIGKILL" in why:
        return "Most often the machine ran out of memory: see the kernel's log; a smaller --batch needs less."
    if not any(name in why for name in CRASHES):
        return "The storage, the model's engine or the file hangs or fails; the next run tries it again."
    return "Twice. The file is most likely damaged: compare it with the original. --retry-failed tries it again."


def _watch(pid: int, reader: int, stall_limit_s: float, state: _State) -> tuple[int, str]:
    """Wait for a worker's end; return its exit code, and why it was lost where it did not end by itself."""

    def forward(signum: int, frame: FrameType | None) -> None:
        state.stopped_by, state.stopped_s = signum, time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)

    before = [signal.signal(signum, forward) for signum in _SIGNALS]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    poll = select.poll()
    poll.register(reader, select.POLLIN | select.POLLHUP)
    rest, silent_s, stalled, ticked_s = b"", 0.0, False, time.monotonic()
    try:
        while True:
            heard = os.read(reader, 1 << 16) if poll.poll(_TICK_S * 1000) else None
            now = time.monotonic()
            # Time in which this process did not run either (it was stopped, or the machine slept) is no silence.
            silent_s, ticked_s = silent_s + min(now - ticked_s, 2 * _TICK_S), now
            if heard == b"":
                break
            if heard is None and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None:
                break  # it is gone, though something that it started still holds the pipe
            if heard:
                silent_s = 0.0
                *lines, rest = (rest + heard).split(b"\n")
                for text in lines:
                    _note(state, json.loads(text))
            at_work = state.at is not None or state.loads
            hangs = stall_limit_s > 0 and bool(at_work) and silent_s > stall_limit_s
            if hangs or (state.stopped_by and now - state.stopped_s > _GRACE_S):
                stalled = hangs
                os.kill(pid, signal.SIGKILL)
                break
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(reader)
        for signum, handler in zip(_SIGNALS, before, strict=True):
            signal.signal(signum, handler)
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status), ""
    if state.stopped_by:
        return 128 + state.stopped_by, ""
    if stalled:
        return 0, f"read and computed nothing for {stall_limit_s:g} s and was ended"
    name = signal.Signals(os.WTERMSIG(status)).name
    return 0, f"died ({name})"


def _note(state: _State, said: dict[str, Any]) -> None:
    if "begin" in said:
        state.at = said
    elif "load" in said:
        state.loads = printable(said["load"])
    elif "start" in said:
        state.started = True
    elif "end" in said:
        if said["result"] is not None:
            state.settled[said["end"]] = said["result"]
        state.at = None

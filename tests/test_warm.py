"""A warm process is what `python -c` would be, and was not started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import warm

BARE = "import json"  # all that these processes need in advance


def pair(code: str, *arguments: str) -> list[tuple[int, str, str]]:
    """What code does in a process that is started, and in one that is forked."""
    command = [sys.executable, "-c", code, *arguments]
    environment = dict(os.environ)  # without what a library of this process has put beside it
    started = subprocess.run(
        command, capture_output=True, text=True, errors="surrogateescape", check=False, env=environment
    )
    forked = warm.run(code, *arguments, imports=BARE)
    return [(one.returncode, one.stdout, one.stderr) for one in (started, forked)]


@pytest.mark.parametrize(
    "code",
    [
        "import sys, os; print(sys.argv, sys.path, os.getcwd(), sorted(os.environ.items()), __name__)",
        "import os; print(os.sched_getaffinity(0), oct(os.umask(0)), sorted(os.listdir('/proc/self/fd')))",
        "import sys; print([(s.encoding, s.errors, s.line_buffering, s.isatty()) for s in (sys.stdout, sys.stderr)])",
        "import signal; print([signal.getsignal(s) for s in (2, 13, 15, 17)], signal.pthread_sigmask(0, []))",
        "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)",
        "import sys; sys.exit('a message')",
        "import atexit; atexit.register(print, 'last')",
        "import atexit, threading as t; atexit.register(print, 'last'); t.Timer(0.05, print, ['thread']).start()",
        "import os; os.write(1, b'x'); os.abort()",
        "import os; os.kill(os.getpid(), 9)",
        "import sys; sys.stdout = None",
        "print('\\udcff')",
        "import os, sys; print('kept'); os.fork() or sys.exit(1); print(os.wait()[1])",
        "import multiprocessing as m; p = m.get_context('fork').Process(target=print, args='x'); p.start(); p.join()",
    ],
)
def test_it_is_the_process_that_would_have_been_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    another = warm.start("import time; time.sleep(60)", imports=BARE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAID_LATER", "é")
    before = os.umask(0o27)
    try:
        (code_a, out_a, err_a), (code_b, out_b, err_b) = pair(code, "a b", "é\n")
    finally:
        os.umask(before)
        another.kill()
        another.communicate()
    assert (code_b, out_b) == (code_a, out_a)
    assert err_b.splitlines()[-1:] == err_a.splitlines()[-1:]  # a traceback has the server's frames, too


def test_it_need_not_import_and_a_real_start_must() -> None:
    code = "import sys; print('decimal' in sys.modules, 'warm.' 'serve' in open('/proc/self/cmdline').read())"
    assert warm.run(code, imports="import decimal").stdout == "True True\n"
    early = os.environ | {"PYTHONNODEBUGRANGES": "1"}  # Python reads it when it starts: so it is started
    assert warm.run(code, imports="import decimal", env=early).stdout == "False False\n"


def test_processes_run_side_by_side_and_are_signalled_like_any_other() -> None:
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # in the background, too
    code = f"{heard}import time; print('ready', flush=True)\nwhile True: time.sleep(0.1)"
    running = [warm.start(code, imports=BARE) for _ in range(2)]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        running[0].wait(0.01)
    running[1].terminate()
    assert running[1].communicate(20) == ("", "")
    assert running[1].returncode == -signal.SIGTERM
    assert running[0].poll() is None
    running[0].send_signal(signal.SIGINT)
    _, errors = running[0].communicate(20)
    assert (running[0].returncode, errors.splitlines()[-1]) == (-signal.SIGINT, "KeyboardInterrupt")


def test_what_starts_threads_is_not_imported_in_advance(capfd: pytest.CaptureFixture[str]) -> None:
    threaded = "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"
    with pytest.raises(RuntimeError, match="did not start"):
        warm.run("pass", imports=threaded)
    assert "a process with 2 threads is not forked" in capfd.readouterr().err

"""Runs a command in which the kernel denies system calls: what a machine without them would do, for real.

A seccomp filter (Documentation/userspace-api/seccomp_filter.rst) needs no privileges and reaches native code, too.
x86-64 alone: the numbers of system calls are the machine's.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import subprocess
import sys
from collections.abc import Sequence

import pytest

SOCKET, FLOCK, FCNTL, CLONE, CLONE3 = 41, 73, 72, 56, 435
CLONE_THREAD = 0x10000
F_SETLK, F_SETLKW, F_OFD_SETLK = 6, 7, 37
AF_INET, AF_INET6 = 2, 10
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2


def _instruction(code: int, jt: int, jf: int, k: int) -> bytes:
    return struct.pack("HBBI", code, jt, jf, k)


def _deny(call: int, argument: int | None, values: Sequence[int], action: int) -> bytes:
    """If the call is this one (and its argument one of these), act; go on otherwise."""
    load, equal, ret = 0x20, 0x15, 0x06
    if argument is None:
        return _instruction(load, 0, 0, 0) + _instruction(equal, 0, 1, call) + _instruction(ret, 0, 0, action)
    program = _instruction(load, 0, 0, 0) + _instruction(equal, 0, 2 * len(values) + 1, call)
    program += _instruction(load, 0, 0, 16 + 8 * argument)
    for value in values:
        program += _instruction(equal, 0, 1, value) + _instruction(ret, 0, 0, action)
    return program


def _deny_threads() -> bytes:
    """No new thread, as at a limit of processes; a new process may be made."""
    load, has, ret = 0x20, 0x45, 0x06
    old = _instruction(load, 0, 0, 0) + _instruction(0x15, 0, 3, CLONE) + _instruction(load, 0, 0, 16)
    old += _instruction(has, 0, 1, CLONE_THREAD) + _instruction(ret, 0, 0, _ERRNO | errno.EAGAIN)
    return _deny(CLONE3, None, (), _ERRNO | errno.ENOSYS) + old  # whose flags lie in memory: libc takes the old one


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _install(program: bytes) -> None:
    program += _instruction(0x06, 0, 0, _ALLOW)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    filter_ = _Program(len(program) // 8, program)
    if libc.prctl(_PR_SET_SECCOMP, _FILTER, ctypes.byref(filter_), 0, 0):
        os.write(2, b"seccomp is not available\n")
        os._exit(99)


def run_without(
    what: str, arguments: Sequence[object], env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `mtdp-extract` without `network` (an internet socket kills it), `locks` (ENOLCK) or new `threads`."""
    if platform.machine() != "x86_64":
        pytest.skip("the numbers of system calls are those of x86-64")
    locks = _deny(FLOCK, None, (), _ERRNO | errno.ENOLCK)
    locks += _deny(FCNTL, 1, (F_SETLK, F_SETLKW, F_OFD_SETLK), _ERRNO | errno.ENOLCK)
    sockets = _deny(SOCKET, 0, (AF_INET, AF_INET6), _KILL)
    program = {"network": sockets, "locks": locks, "threads": _deny_threads()}[what]
    result = subprocess.run(
        [sys.executable, "-c", "from mtdp_runtime.commands.extract import main; main()", *map(str, arguments)],
        preexec_fn=lambda: _install(program),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(env or {})},
    )
    if result.returncode == 99:
        pytest.skip("this machine has no seccomp")
    return result

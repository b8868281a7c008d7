"""What tests run in a process of its own, where it fails: such a process imports this module, and nothing heavy."""

from __future__ import annotations

import os
import threading

from mtdp_export.errors import ExportUsageError


def abort(*arguments: object) -> None:
    os.abort()


def refuse(message: str, hint: str) -> None:
    raise ExportUsageError(message, hint)


class Picky(Exception):
    """Made again from its message alone, as pickle does, it fails."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


class Held(Exception):
    def __init__(self) -> None:
        super().__init__("it keeps a lock")
        self.lock = threading.Lock()


def raise_picky() -> None:
    raise Picky("it wants", "two")


def raise_held() -> None:
    raise Held

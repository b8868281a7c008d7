"""A run whose --out is a bucket: files are made in a folder of this machine, and go up when their slide is complete.

A slide is done by a small object, `.done/<slide>.json`, written after all others: it holds the keys of the slide's
feature files (`unread`), what was made of them, and what the server states of each object. It only saves work. Where
there is none, or it does not fit, the feature file of the bucket is brought here and judged as one that lies in a
folder; so nothing is replaced in a bucket that would not be in a folder. Objects appear whole or not at all; who puts
one last, wins. No claim is seen by other machines: each takes its part of the slides (--shard).
"""

from __future__ import annotations

import json
import secrets
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from mtdp_runtime.cohort import failures, objects, remote
from mtdp_runtime.cohort.servers import TransferFailed
from mtdp_runtime.errors import OutputUnwritable, StoreError
from mtdp_runtime.extraction.models import Target
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.faults import capitalised, remedy
from mtdp_runtime.files import write_atomically
from mtdp_runtime.store import derived, run_log
from mtdp_runtime.store.verify import verify_file
from mtdp_runtime.urls import SlideUrl

_MARKS: Final = ".done"
_LOGS: Final = "runs"
_NAME: Final = ".name"  # of this folder's log among those of other machines


@dataclass(frozen=True, slots=True)
class Uploads:
    """Where the files of a folder go. Everything here raises `TransferFailed` where the server does not do it."""

    url: SlideUrl
    folder: Path
    beat: Callable[[int], None] = lambda count: None  # called while something goes up or down, and is waited for

    def are_done(self, targets: Sequence[Target], kinds: Sequence[str]) -> bool:
        """Say whether the files of a slide were put up, by their keys, with what is to be derived from them."""
        mark = self._mark(targets)
        try:
            fits = {*kinds} <= {*mark["kinds"]} and all(
                one.key and one.key == mark["keys"][self._place(one.path)] for one in targets
            )
            stated = {self._place(one.path): tuple(mark["files"][self._place(one.path)]) for one in targets}
        except (KeyError, TypeError):
            return False
        return fits and all(objects.find(self.url / place, self.beat) == facts for place, facts in stated.items())

    def bring_back(self, targets: Sequence[Target]) -> None:
        """Fetch the feature files that are there and not here.

        Raises:
            StoreError: one is damaged.
            OutputUnwritable: this machine's disk takes none.
        """
        for path in (one.path for one in targets if not one.path.exists()):
            try:
                self._bring(path)
            except OSError as error:
                raise OutputUnwritable(
                    f"{path}: cannot be written: {error.strerror}",
                    hint=f"{capitalised(remedy(error))}, or name another folder with --stage.",
                ) from error

    def put(self, targets: Sequence[Target], kinds: Sequence[str]) -> None:
        """Put up the files of a slide and what was derived from them, then say that it is done; none is left here."""
        objects.remove(self._mark_url(targets), self.beat)
        keys, stated = {self._place(one.path): one.key for one in targets}, dict[str, Any]()
        for target in targets:
            for path in (*derived.made_from(target.path), target.path):
                if path.is_dir():
                    objects.remove(self._url(path), self.beat)
                for one in derived.files_below(path):
                    stated[self._place(one)] = objects.put(one, self._url(one), self.beat)
        mark = {"keys": keys, "kinds": [*kinds], "files": stated}
        objects.put(json.dumps(mark, indent=1).encode(), self._mark_url(targets), self.beat)
        self.clear(targets)

    def clear(self, targets: Sequence[Target]) -> None:
        """Remove what is here of a slide that is done."""
        for target in targets:
            for path in (*derived.made_from(target.path), target.path):
                with suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def put_logs(self) -> None:
        """Put up run.jsonl and failed.csv of this folder, under names that no other machine has."""
        own, log, failed = self.folder / _NAME, self.folder / run_log.NAME, self.folder / failures.NAME
        if not own.exists():
            write_atomically(own, f"{socket.gethostname()}-{secrets.token_hex(3)}".encode())
        name = own.read_text("utf-8")
        objects.put(log if log.is_file() else b"", self.url / _LOGS / f"{name}.jsonl", self.beat)
        table = self.url / _LOGS / f"{name}.{failures.NAME}"
        if failed.is_file():
            objects.put(failed, table, self.beat)
        else:
            objects.remove(table, self.beat)

    def look(self) -> None:
        """Make sure that files can be put there: the logs are.

        Raises:
            OutputUnwritable: they cannot.
        """
        try:
            self.put_logs()
        except TransferFailed as error:
            raise OutputUnwritable(
                f"--out {self.url}: cannot be written: {error}",
                hint="Check its name, the rights and the room there; then run the same command again.",
            ) from None

    def look_again(self, refused: SlideUrl) -> None:
        """Do so where one of our files was refused: if all are, no further slide is computed to no purpose.

        Raises:
            OutputUnwritable: they are.
        """
        if refused.is_relative_to(self.url):
            self.look()

    def named(self, outcome: Outcome) -> Outcome:
        """Return an outcome whose files are named where they are now."""
        outputs = tuple(map(self._url, outcome.outputs))
        return replace(outcome, output=outputs[0], outputs=outputs)

    def _bring(self, path: Path) -> None:
        record, url = derived.record_path(path), self._url(path)
        if objects.find(url, self.beat) is None:
            return
        scratch = path.with_name(f".{path.stem}.fetched.partial.h5")
        scratch.unlink(missing_ok=True)
        remote.fetch(url, scratch, self.beat)
        verdict = verify_file(scratch)
        if verdict.status == "wrong":
            scratch.unlink()
            raise StoreError(
                f"{url}: {'; '.join(verdict.problems)}", hint="Delete the object, and run the same command again."
            )
        content = objects.read_whole(self._url(record), self.beat)
        if content is not None:
            record.parent.mkdir(exist_ok=True)
            write_atomically(record, content)
        scratch.replace(path)

    def _place(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _url(self, path: Path) -> SlideUrl:
        return self.url / self._place(path)

    def _mark_url(self, targets: Sequence[Target]) -> SlideUrl:
        return self.url / _MARKS / f"{targets[0].path.stem}.json"

    def _mark(self, targets: Sequence[Target]) -> Any:
        try:
            return json.loads(objects.read_whole(self._mark_url(targets), self.beat) or b"{}")
        except ValueError:
            return {}

"""run.jsonl: a line per slide, whatever happened to the lines before."""

from __future__ import annotations

import json
import os
import socket
from datetime import datetime
from pathlib import Path

import pytest

from mtdp_runtime.errors import OutputUnwritable
from mtdp_runtime.store import run_log
from mtdp_runtime.version import __version__


def lines_of(out: Path) -> list[str]:
    return (out / run_log.NAME).read_text().split("\n")[:-1]


def test_a_line_that_a_full_disk_tore_does_not_swallow_the_next(tmp_path: Path) -> None:
    failed = {"slide": "/a.svs", "status": "failed", "attempt": "1", "message": "torn"}
    run_log.append(tmp_path, failed)
    with (tmp_path / run_log.NAME).open("a") as stream:
        stream.write('{"slide": "/b.svs", "sta')
    run_log.append(tmp_path, {"slide": "/c.svs", "status": "failed", "attempt": "3"})
    assert json.loads(lines_of(tmp_path)[2])["slide"] == "/c.svs"
    assert sorted(run_log.failures(tmp_path)) == ["1", "3"]


def test_lines_are_ended_by_line_feeds_alone(tmp_path: Path) -> None:
    """A name may hold U+2028, which Python also takes for the end of a line."""
    line = {"slide": "/a\u2028b.svs", "status": "failed", "attempt": "1"}
    run_log.append(tmp_path, line)
    assert run_log.failures(tmp_path) == {"1": line}


@pytest.mark.parametrize("what", ["a folder", "a pipe", "a link", "a device"])
def test_what_is_no_file_is_said_and_nothing_waits_for_it(tmp_path: Path, what: str) -> None:
    path, elsewhere = tmp_path / run_log.NAME, tmp_path / "elsewhere"
    elsewhere.write_text("")
    if what == "a folder":
        path.mkdir()
    elif what == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(elsewhere if what == "a link" else "/dev/zero")
    if what != "a device":  # which is_file() looks through
        assert run_log.failures(tmp_path) == {}
    with pytest.raises(OutputUnwritable, match=r"run\.jsonl: cannot be written"):
        run_log.append(tmp_path, {"slide": "/a.svs", "status": "done"})
    assert elsewhere.read_text() == ""


def test_the_line_of_a_run_is_skipped_and_each_slides_line_says_of_which_run_it_is(tmp_path: Path) -> None:
    mark = run_log.RunMark(["mtdp-extract", "a.svs"])
    mark.begin(tmp_path, [{"name": "tiny", "digest": "0"}])
    mark.append(tmp_path, {"slide": "/a.svs", "status": "failed", "attempt": "1"})
    with (tmp_path / run_log.NAME).open("a") as stream:
        stream.write('{"run": "x", "started": "20')  # of another run, torn by a full disk
    mark.append(tmp_path, {"slide": "/b.svs", "status": "failed", "attempt": "2"})
    first, *others = lines_of(tmp_path)
    run = json.loads(first)
    assert run["arguments"] == ["mtdp-extract", "a.svs"]
    assert run["models"] == [{"name": "tiny", "digest": "0"}]
    assert (run["host"], run["version"]) == (socket.gethostname(), __version__)
    assert datetime.fromisoformat(run["started"]).tzinfo is not None
    for line in map(json.loads, (others[0], others[2])):
        assert (line["run"], line["host"]) == (run["run"], run["host"])
        assert datetime.fromisoformat(line["time"]) >= datetime.fromisoformat(run["started"])
    assert sorted(run_log.failures(tmp_path)) == ["1", "2"]
    assert run_log.RunMark().run != mark.run

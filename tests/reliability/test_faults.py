"""What fails around a run is said in a line, costs as little as it can, and leaves what was computed."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import openslide
import pytest

import warm
from denied import run_without
from mtdp_runtime.slide.open import open_slide
from support import pyramid, read_square, slide_lines, stained

MIB = 1 << 20


def extract(*arguments: object, prepare: str = "", limit: Callable[[], None] | None = None) -> tuple[int, str, str]:
    """Run the command in a process of its own, after some lines of code that inject a fault into it."""
    code = f"{textwrap.dedent(prepare)}\nfrom mtdp_runtime.commands.extract import main; main()"
    options = [*map(str, arguments), "--no-report", "--backend", "onnxruntime", "--threads", "1"]
    if limit is None:
        result = warm.run(code, *options)
    else:  # it holds from the start on
        command = [sys.executable, "-c", code, *options]
        result = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode, result.stdout, result.stderr


def statuses(out: Path) -> list[tuple[str, str]]:
    return [(Path(line["slide"]).name, line["status"]) for line in slide_lines(out)]


# A decoder that a slide called b crashes or hangs: it is reached as a real one is, from the reading threads.
BAD_DECODER = """
    import mtdp_runtime.slide.tiled_tiff as reader, os, signal, time, mtdp_runtime.pipeline.run as pipeline
    read_tile = pipeline.read_tile
    def bad(slide, *arguments):
        if slide.info.path.name.startswith("b"):
            {}
        return read_tile(slide, *arguments)
    pipeline.read_tile = bad
"""


def test_a_slide_that_crashes_the_process_costs_itself_alone(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    """And is not tried again unasked, while it is the same."""
    for name in ("a.tiff", "b.tiff", "c.tiff"):
        make_slide(name)
    out = tmp_path / "o"
    crash = BAD_DECODER.format("os.kill(os.getpid(), signal.SIGSEGV)")
    code, said, errors = extract(tmp_path, "--model", tiny_bundle, "--out", out, prepare=crash)
    assert code == 1
    assert "b.tiff: the process died (SIGSEGV) at this slide" in errors
    assert "2 of 3 slides done, 1 failed" in said
    assert statuses(out) == [("a.tiff", "done"), ("b.tiff", "failed"), ("c.tiff", "done")]
    assert not (out / ".claims").exists()

    code, said, errors = extract(tmp_path, "--model", tiny_bundle, "--out", out)
    assert code == 1
    assert "--retry-failed tries it again" in errors
    code, _, _ = extract(tmp_path, "--model", tiny_bundle, "--out", out, "--retry-failed")
    assert code == 0
    assert sorted(p.name for p in out.iterdir()) == ["a.h5", "b.h5", "c.h5", "run.jsonl"]


def test_a_decoder_that_hangs_is_ended_at_the_stall_limit(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("a.tiff", "b.tiff", "c.tiff"):
        make_slide(name)
    hang = BAD_DECODER.format("time.sleep(1000)")
    out = tmp_path / "o"
    code, _, errors = extract(tmp_path, "--model", tiny_bundle, "--out", out, "--stall-limit", 3, prepare=hang)
    assert code == 1
    assert "b.tiff: the process read and computed nothing for 3 s and was ended at this slide" in errors
    assert statuses(out) == [("a.tiff", "done"), ("b.tiff", "failed"), ("c.tiff", "done")]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_parent_ends_the_worker_and_leaves_a_partial(
    tiny_bundle: Path, tmp_path: Path, signum: int, code: int
) -> None:
    slide = pyramid(stained(1024, 1024), tmp_path / "a.tiff", 0.5, 2, lossy=True)
    slow = "import time, mtdp_runtime.pipeline.run as p\nr = p.read_tile\n"
    slow += (
        "p.read_tile = lambda *a: (time.sleep(0.05), r(*a))[1]\nfrom mtdp_runtime.commands.extract import main; main()"
    )
    options = ["--model", tiny_bundle, "--out", tmp_path / "o", "--threads", 1, "--batch", 4]
    process = warm.start(slow, slide, *options)
    partial = tmp_path / "o" / ".a.h5.partial"
    for _ in range(3000):
        if partial.exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    time.sleep(1)
    process.send_signal(signum)
    _, errors = process.communicate()
    assert process.returncode == code
    assert errors.strip() == "stopped: what was computed is kept; run the same command again to go on"
    with h5py.File(partial) as file:
        assert 0 < (file["status"][:] == 0).sum() < len(file["status"])
    assert not (tmp_path / "o" / ".claims").exists()


def test_a_full_disk_ends_the_run_and_a_rerun_goes_on(tiny_bundle: Path, tmp_path: Path) -> None:
    """A real limit of the kernel: no file may grow beyond it."""
    slide = pyramid(stained(2048, 2048), tmp_path / "a.tiff", 0.5, 2, lossy=True)
    options = [slide, "--model", tiny_bundle, "--out", tmp_path / "o", "--stride-px", 16, "--min-tissue", 0]
    limit = 200 << 10
    code, _, errors = extract(*options, limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert code == 2
    assert "a.h5: cannot be written: " in errors
    assert "hint: Raise the limit of file sizes (ulimit -f), or choose another --out" in errors
    assert not (tmp_path / "o" / "a.h5").exists()
    assert extract(*options)[0] == 0


def test_a_disk_that_fills_while_rows_are_written_keeps_those_before(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    full = """
        import errno, os
        import mtdp_runtime.store.writer as writer
        append, calls = writer.FeatureStore.append, []
        def fills(*arguments):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        def counted(*arguments):
            calls.append(1)
            if len(calls) > 3:
                os.pwrite = fills
            append(*arguments)
        writer.FeatureStore.append = counted
        writer._SYNC_EVERY_S = -1
    """
    options = [make_slide("a.tiff"), "--model", tiny_bundle, "--out", tmp_path / "o", "--batch", 4]
    code, _, errors = extract(*options, prepare=full)
    assert code == 2
    assert "a.h5: cannot be written: No space left on device" in errors
    with h5py.File(tmp_path / "o" / ".a.h5.partial") as file:
        done = file["status"][:] == 0
        assert done.sum() >= 4
        kept = file["features"][:][done]
    assert extract(*options)[0] == 0
    with h5py.File(tmp_path / "o" / "a.h5") as file:
        np.testing.assert_array_equal(file["features"][:][done], kept)
        assert file.attrs["rows_from_an_earlier_run"] == done.sum()


def test_an_output_folder_that_is_removed_ends_the_run(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    remove = f"""
        import shutil, mtdp_runtime.pipeline.run as pipeline
        run = pipeline.run_pipeline
        import mtdp_runtime.extraction.extract as e
        def removed(*arguments, **options):
            shutil.rmtree({str(tmp_path / "o")!r})
            return run(*arguments, **options)
        e.run_pipeline = removed
    """
    make_slide("a.tiff")
    make_slide("b.tiff")
    code, _, errors = extract(tmp_path, "--model", tiny_bundle, "--out", tmp_path / "o", prepare=remove)
    assert code == 2
    assert errors.startswith("error: ")
    assert "cannot be written" in errors


def test_a_folder_that_cannot_be_written_is_said_before_any_work(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "o"
    out.mkdir()
    out.chmod(0o555)

    def without_roots_rights() -> None:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: root must ask, too, after exec

    code, _, errors = extract(make_slide(), "--model", tiny_bundle, "--out", out, limit=without_roots_rights)
    out.chmod(0o755)
    assert code == 2
    assert f"error: {out}: cannot be written: Permission denied" in errors
    assert list(out.iterdir()) == []


def test_a_slide_that_vanishes_fails_or_is_read_to_its_end(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    """On a local disk an open file stays; on a network share each further read fails. Here: no handle survives."""
    vanish = """
        import os, mtdp_runtime.slide.tiled_tiff as fast, mtdp_runtime.pipeline.run as pipeline
        read_tile, count, pread = pipeline.read_tile, [], os.pread
        def stale(slide, *arguments):
            count.append(1)
            if slide.info.path.name == "a.tiff" and len(count) > 10:
                slide.info.path.unlink(missing_ok=True)
                def gone(file, *a):  # the slide's share alone: the records are elsewhere
                    if os.readlink(f"/proc/self/fd/{file}").endswith("run.jsonl"):
                        return pread(file, *a)
                    raise OSError(116, "Stale file handle")
                os.pread = gone
                while not slide._slide._reference._idle.empty():
                    slide._slide._reference._idle.get().close()
                slide._slide._cache._tiles.clear()
            return read_tile(slide, *arguments)
        pipeline.read_tile = stale
    """
    make_slide("a.tiff")
    out = tmp_path / "o"
    code, _, errors = extract(tmp_path / "a.tiff", "--model", tiny_bundle, "--out", out, "--batch", 4, prepare=vanish)
    assert code == 1
    assert "a.tiff" in errors
    assert "hint: " in errors
    assert not (out / "a.h5").exists()


def test_an_error_of_the_disk_is_tried_again_on_another_handle(
    slides_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the fast reader's read fails, then OpenSlide's first; the second, on a new handle, gives the tile."""
    with open_slide(slides_dir / "CMU-1-Small-Region.svs") as slide:
        expected = read_square(slide, 480, 480, 64, 1.0)
    opened, failed = [], []
    read_region, init = openslide.OpenSlide.read_region, openslide.OpenSlide.__init__

    def counted(self: openslide.OpenSlide, path: Path) -> None:
        opened.append(1)
        init(self, path)

    def fails_once(self: openslide.OpenSlide, *arguments: object) -> object:
        if not failed:
            failed.append(1)
            raise openslide.OpenSlideError("Input/output error")
        return read_region(self, *arguments)

    def broken(*arguments: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(openslide.OpenSlide, "__init__", counted)
    with open_slide(slides_dir / "CMU-1-Small-Region.svs") as slide:
        monkeypatch.setattr(openslide.OpenSlide, "read_region", fails_once)
        monkeypatch.setattr(os, "pread", broken)
        again = read_square(slide, 480, 480, 64, 1.0)
    assert (len(opened), len(failed)) == (2, 1)
    np.testing.assert_array_equal(again, expected)


def test_no_memory_for_the_batches_fails_in_a_line(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    """A real limit: four buffers of 2.4 GB do not fit."""
    code, _, errors = extract(
        make_slide(), "--model", tiny_bundle, "--out", tmp_path / "o", "--batch", 200_000,
        limit=lambda: resource.setrlimit(resource.RLIMIT_AS, (6000 * MIB, 6000 * MIB)),
    )  # fmt: skip
    assert code == 1
    assert "out of memory" in errors
    assert "smaller --batch" in errors


def test_an_engine_that_runs_out_of_memory_ends_the_run_and_keeps_the_rows(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    """It would do so for every slide: so the run ends, and a rerun goes on."""
    fails = """
        import mtdp_runtime.backends.onnxruntime as o
        result, calls = o.OnnxRuntime.result, []
        def bad_alloc(self, ticket):
            calls.append(1)
            if len(calls) == 5:
                self._running[ticket].result()
                def broken(): raise RuntimeError("std::bad_alloc")
                self._running[ticket] = self._worker.submit(broken)
            return result(self, ticket)
        o.OnnxRuntime.result = bad_alloc
    """
    make_slide("a.tiff")
    make_slide("b.tiff")
    out = tmp_path / "o"
    options = [tmp_path, "--model", tiny_bundle, "--out", out, "--batch", 4]
    code, _, errors = extract(*options, prepare=fails)
    assert code == 2
    assert "failed on a batch: std::bad_alloc" in errors
    with h5py.File(out / ".a.h5.partial") as file:
        assert (file["status"][:] == 0).sum() == 16
    assert extract(*options)[0] == 0
    assert statuses(out) == [("a.tiff", "done"), ("b.tiff", "done")]


def test_a_share_without_locks_is_good_enough(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    """The kernel refuses every lock, as some network shares do; HDF5's own wish for locks is left as it is."""
    result = run_without("locks", [make_slide(), "--model", tiny_bundle, "--out", tmp_path / "o"])
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "o" / "report" / "slide.html").exists()
    assert statuses(tmp_path / "o") == [("slide.tiff", "done")]


def test_a_name_that_is_no_text_is_a_slide_like_any_other(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9\n\x1b[31m.tiff")
    shutil.move(make_slide("a.tiff"), odd)
    code, said, errors = extract(odd, "--model", tiny_bundle, "--out", tmp_path / "o")
    assert code == 0, errors
    assert said.splitlines()[-1].startswith(r"caf\udce9\n\x1b[31m.tiff: ")
    assert said.replace("\n", "").isprintable()  # a name cannot command the terminal
    (line,) = slide_lines(tmp_path / "o")
    assert line["slide"] == str(odd)
    assert (tmp_path / "o" / f"{odd.stem}.h5").exists()


# A slide called b ends the process, or hangs it, when it is opened.
BAD_TO_OPEN = """
    import mtdp_runtime.cohort.preflight as preflight, mtdp_runtime.cohort.requests as requests, os, signal, time
    open_slide = requests.open_slide
    def bad(path, *arguments):
        if path.name.startswith("b"):
            {}
        return open_slide(path, *arguments)
    preflight.open_slide = requests.open_slide = bad
"""
CRASH = BAD_TO_OPEN.format("os.kill(os.getpid(), signal.SIGSEGV)")


def with_masks(folder: Path, make_slide: Callable[..., Path], names: str) -> Path:
    """Write slides, a mask that fits all of them, and the manifest of both."""
    corners = [[0, 0], [256, 0], [256, 256], [0, 256], [0, 0]]
    (folder / "m.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [corners]}))
    for name in names:
        make_slide(f"{name}.tiff")
    manifest = folder / "slides.csv"
    manifest.write_text("slide,mask\n" + "".join(f"{name}.tiff,m.geojson\n" for name in names))
    return manifest


@pytest.mark.parametrize("what", ["os.kill(os.getpid(), signal.SIGSEGV)", "time.sleep(1000)"], ids=["crash", "hang"])
def test_a_slide_that_ends_the_process_while_masks_are_looked_at_costs_itself_alone(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, what: str
) -> None:
    manifest, out = with_masks(tmp_path, make_slide, "abc"), tmp_path / "o"
    options = (manifest, "--model", tiny_bundle, "--out", out, "--stall-limit", 3)
    code, said, errors = extract(*options, prepare=BAD_TO_OPEN.format(what))
    assert code == 1
    assert "b.tiff: the process " in errors
    assert "2 of 3 slides done, 1 failed" in said
    assert statuses(out) == [("b.tiff", "failed"), ("a.tiff", "done"), ("c.tiff", "done")]


def test_a_dry_run_survives_it_too_and_writes_nothing(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slides = [make_slide(f"{name}.tiff") for name in "abcd"]
    unforeseen = (
        "\n    import mtdp_runtime.cohort.dry_run as dry_run\n    make_plan = dry_run.make_plan\n"
        + textwrap.indent(
            textwrap.dedent("""
            def odd(slide, *arguments):
                if slide.info.path.name.startswith("c"):
                    raise ZeroDivisionError("nobody thought of this")
                return make_plan(slide, *arguments)
            dry_run.make_plan = odd
        """),
            "    ",
        )
    )
    options = (*slides, "--model", tiny_bundle, "--out", tmp_path / "o", "--dry-run")
    code, said, errors = extract(*options, prepare=CRASH + unforeseen)
    assert code == 1
    assert "b.tiff: the process died (SIGSEGV) at this slide" in errors
    assert "nobody thought of this" in errors
    assert "4 slides: " in said
    assert "2 failed" in said
    assert "a.tiff: " in said
    assert "d.tiff: " in said
    assert not (tmp_path / "o").exists()


def test_a_mask_that_vanishes_fails_its_slide_alone_and_is_tried_again(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    manifest, out = with_masks(tmp_path, make_slide, "ab"), tmp_path / "o"
    own = tmp_path / "own.geojson"
    shutil.copy(tmp_path / "m.geojson", own)
    manifest.write_text("slide,mask\na.tiff,own.geojson\nb.tiff,m.geojson\n")
    vanish = f"""
        import mtdp_runtime.cohort.run as run, pathlib
        refused = run.refused
        def looked(*arguments):
            found = refused(*arguments)
            pathlib.Path({str(own)!r}).unlink()
            return found
        run.refused = looked
    """
    options = (manifest, "--model", tiny_bundle, "--out", out)
    code, _, errors = extract(*options, prepare=vanish)
    assert code == 1
    assert "own.geojson: the mask cannot be read" in errors
    assert statuses(out) == [("a.tiff", "failed"), ("b.tiff", "done")]
    shutil.copy(tmp_path / "m.geojson", own)
    assert extract(*options)[0] == 0


def test_a_slide_that_could_not_be_opened_when_masks_were_looked_at_is_checked_at_its_turn(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    """The share was away for a moment, and the mask is another slide's."""
    manifest, out = with_masks(tmp_path, make_slide, "a"), tmp_path / "o"
    corners = [[0, 0], [9000, 0], [9000, 9000], [0, 9000], [0, 0]]
    (tmp_path / "m.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [corners]}))
    away = """
        import mtdp_runtime.cohort.preflight as preflight
        open_slide, calls = preflight.open_slide, []
        def later(*arguments):
            calls.append(1)
            if len(calls) == 1:
                raise OSError(5, "Input/output error")
            return open_slide(*arguments)
        preflight.open_slide = later
    """
    code, _, errors = extract(manifest, "--model", tiny_bundle, "--out", out, prepare=away)
    assert code == 1
    assert "outside of" in errors
    assert not (out / "a.h5").exists()


def test_what_vanishes_before_another_slide_crashes_fails_alone(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    """The new worker does not take it for a wrong command: work has begun."""
    manifest, out = with_masks(tmp_path, make_slide, "abcd"), tmp_path / "o"
    shutil.copy(tmp_path / "m.geojson", tmp_path / "own.geojson")
    manifest.write_text("slide,mask\na.tiff,\nb.tiff,\nc.tiff,own.geojson\nd.tiff,\n")
    crash = BAD_DECODER.format(
        f"folder = __import__('pathlib').Path({str(tmp_path)!r}); (folder / 'a.tiff').unlink(); "
        "(folder / 'own.geojson').unlink(); os.kill(os.getpid(), signal.SIGSEGV)"
    )
    code, _, errors = extract(manifest, "--model", tiny_bundle, "--out", out, prepare=crash)
    assert code == 1
    assert "own.geojson: the mask cannot be read" in errors
    assert statuses(out) == [("a.tiff", "done"), ("b.tiff", "failed"), ("c.tiff", "failed"), ("d.tiff", "done")]

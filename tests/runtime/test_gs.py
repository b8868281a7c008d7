"""gs:// against a server of Google's protocol on this machine: slides come from a bucket, and results go there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import pytest

import mtdp_runtime
from mtdp_runtime.cohort import objects, remote, servers
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.urls import SlideUrl

server = pytest.importorskip("gcp_storage_emulator.server")
pytest.importorskip("gcsfs")


@pytest.fixture
def bucket() -> Iterator[str]:
    emulator = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket="slides")
    emulator.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{emulator._api._httpd.server_port}")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # the server speaks no gRPC
        servers._system.cache_clear()
        yield "gs://slides"
    servers._system.cache_clear()
    emulator.stop()


def nothing(_: int) -> None:
    pass


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of the library's own files
def test_a_bucket_of_google_gives_slides_and_takes_what_a_folder_would_hold(
    bucket: str, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide, stage = make_slide("a#1.tiff"), tmp_path / "stage"
    objects.put(slide, SlideUrl(f"{bucket}/in/a#1.tiff"), nothing)

    def run(named: object, out: object) -> Outcome:
        (found,) = mtdp_runtime.extract(named, out, model=tiny_bundle, backend="onnxruntime", stage=stage)  # type: ignore[arg-type]
        return found

    run(slide, tmp_path / "here")
    done = run(f"{bucket}/in/a#1.tiff", f"{bucket}/out")
    assert (done.status, str(done.output)) == ("done", f"{bucket}/out/a#1.h5")
    there = sorted(str(one).removeprefix(f"{bucket}/out/") for one in remote.list_folder(SlideUrl(f"{bucket}/out")))
    assert [name for name in there if not name.startswith("runs/")] == [".done/a#1.json", "a#1.h5"]
    remote.fetch(SlideUrl(f"{bucket}/out/a#1.h5"), tmp_path / "there.h5", nothing)
    with h5py.File(tmp_path / "there.h5") as far, h5py.File(tmp_path / "here" / "a#1.h5") as near:
        assert far["features"][:].tobytes() == near["features"][:].tobytes()
    shutil.rmtree(stage)
    assert run(f"{bucket}/in/a#1.tiff", f"{bucket}/out").status == "skipped", "on a fresh machine"
    with pytest.raises(servers.TransferFailed, match="it is not there"):
        remote.fetch(SlideUrl(f"{bucket}/in/b.tiff"), tmp_path / "b", nothing)

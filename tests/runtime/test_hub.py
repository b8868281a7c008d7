"""A bundle of the Hugging Face hub: pinned by its commit, checked by its digests, from the cache without a network."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import onnx
import pytest

import mtdp_export.verify
import mtdp_runtime
from mtdp_export.cli import main as export
from mtdp_export.model_store import is_apart, load_light, save_model
from mtdp_runtime.backends import backend_class
from mtdp_runtime.backends.proof import replay
from mtdp_runtime.bundle import file_ref, hub, load_bundle, write_manifest
from mtdp_runtime.bundle.engine_key import EngineKey
from mtdp_runtime.bundle.hub import bundle_of
from mtdp_runtime.bundle.manifest import Engine, FileRef
from mtdp_runtime.errors import BackendError, BundleDigestMismatch, BundleInvalid, BundleNotFound, UsageError
from support import in_this_process

constants = pytest.importorskip("huggingface_hub.constants", reason="needs huggingface_hub (the extra `hf`)")
COMMIT, OTHER = "c0ffee" * 6 + "abcd", "b" * 40
MODEL, DATA = "model.fp32.onnx", "model.fp32.onnx.data"


class FakeHub:
    """lab/tiny on the loopback: a folder for each commit, and the revisions that name them."""

    def __init__(self, folder: Path) -> None:
        self.commits: dict[str, Path] = {COMMIT: folder}
        self.names = {"main": COMMIT, "v1.0": COMMIT}
        self.asked: list[str] = []
        self.moves_to = ""  # where main stands once its bundle.json was given
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                fake.asked.append(f"{self.command} {self.path}")
                asked = re.fullmatch(r"/lab/tiny/resolve/([^/]+)/(.+)", self.path)
                commit = fake.names.get(asked[1], asked[1]) if asked else ""
                if asked is None or commit not in fake.commits:
                    return self.answer(404, b"", **{"X-Error-Code": "RevisionNotFound" if asked else "RepoNotFound"})
                file = fake.commits[commit] / asked[2]
                if not file.is_file():
                    return self.answer(404, b"", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
                if fake.moves_to and self.command == "GET" and file.name == "bundle.json":
                    fake.names["main"] = fake.moves_to
                data = file.read_bytes()
                etag = f'"{hashlib.sha1(data).hexdigest()}"'
                return self.answer(200, data, **{"X-Repo-Commit": commit, "ETag": etag})

            do_HEAD = do_GET

            def answer(self, code: int, data: bytes, **headers: str) -> None:
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def fake(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    folder = shutil.copytree(tiny_bundle, tmp_path / "repository")
    (folder / "train.py").write_text("nobody asked for this")
    served = FakeHub(folder)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield served
    served.close()


@pytest.mark.parametrize("revision", [COMMIT, "main", "v1.0"])
def test_a_revision_is_the_commit_that_it_names(fake: FakeHub, tiny_bundle: Path, revision: str) -> None:
    bundle = bundle_of(f"hf:lab/tiny@{revision}")
    assert bundle.source == f"hf:lab/tiny@{COMMIT}"
    assert bundle.digest == load_bundle(tiny_bundle).digest
    assert bundle.checked(bundle.manifest.golden).is_file()
    assert not any("train.py" in asked for asked in fake.asked), "only what bundle.json names is fetched"


def test_the_feature_file_names_the_commit(
    fake: FakeHub, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide = make_slide()
    (outcome,) = mtdp_runtime.extract(slide, tmp_path / "o", model="hf:lab/tiny@main")
    assert outcome.status == "done"
    with h5py.File(tmp_path / "o" / "slide.h5") as file:
        assert file.attrs["model_source"] == f"hf:lab/tiny@{COMMIT}"
    (again,) = mtdp_runtime.extract(slide, tmp_path / "o", model=tiny_bundle)
    assert again.status == "skipped", "the same bundle in a folder is the same model"


def test_a_commit_in_the_cache_needs_no_network(fake: FakeHub) -> None:
    bundle_of(f"hf:lab/tiny@{COMMIT}")
    fake.asked.clear()
    assert bundle_of(f"hf:lab/tiny@{COMMIT}").source.endswith(COMMIT)
    assert fake.asked == []


@pytest.mark.parametrize("how", ["offline", "unreachable"])
def test_without_a_network_the_cache_answers(fake: FakeHub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    bundle_of("hf:lab/tiny@main")
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        fake.close()
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # it tries again for some seconds
    assert bundle_of("hf:lab/tiny@main").source == f"hf:lab/tiny@{COMMIT}"
    with pytest.raises(BundleNotFound, match="is not in the cache, and the hub cannot be reached"):
        bundle_of("hf:lab/tiny@v1.0")


def test_a_branch_that_moved_is_another_commit(fake: FakeHub, tmp_path: Path) -> None:
    first = bundle_of("hf:lab/tiny@main")
    moved = shutil.copytree(fake.commits[COMMIT], tmp_path / "moved")
    (moved / "bundle.json").write_text((moved / "bundle.json").read_text().replace('"tiny"', '"tiny2"'))
    fake.commits[OTHER], fake.names["main"] = moved, OTHER
    second = bundle_of("hf:lab/tiny@main")
    assert (first.manifest.name, second.manifest.name) == ("tiny", "tiny2")
    assert first.digest != second.digest
    assert bundle_of(f"hf:lab/tiny@{COMMIT}").digest == first.digest


def test_a_branch_that_moves_meanwhile_gives_the_files_of_one_commit(fake: FakeHub, tmp_path: Path) -> None:
    fake.commits[OTHER] = shutil.copytree(fake.commits[COMMIT], tmp_path / "moved")
    fake.commits[OTHER].joinpath("model.fp32.onnx").write_bytes(b"another")
    fake.moves_to = OTHER
    bundle = bundle_of("hf:lab/tiny@main")
    assert bundle.checked(bundle.manifest.variants[0].file).parent.name == COMMIT


def test_a_file_that_was_exchanged_is_refused_by_its_digest(fake: FakeHub) -> None:
    model = fake.commits[COMMIT] / "model.fp32.onnx"
    model.write_bytes(bytes(reversed(model.read_bytes())))
    bundle = bundle_of("hf:lab/tiny@main")
    with pytest.raises(BundleDigestMismatch, match="sha256"):
        bundle.checked(bundle.manifest.variants[0].file)


class TestVerify:
    """`mtdp-export --verify hf:...`: one commit of it, as `--model hf:...` takes it."""

    @pytest.fixture(autouse=True)
    def _here(self, fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        """The replay in this process, which alone knows the hub that is acted out."""
        monkeypatch.setattr(mtdp_export.verify, "limited", lambda what, limit_s, replay, *args: replay(*args))

    def verify(self, *more: str) -> tuple[int, str, str]:
        return in_this_process(export, "--verify", "hf:lab/tiny@main", "--backend", "onnxruntime", "-q", *more)

    def test_replays_the_commit_that_the_name_was_resolved_to(self, fake: FakeHub, tmp_path: Path) -> None:
        fake.commits[OTHER] = shutil.copytree(fake.commits[COMMIT], tmp_path / "moved")
        fake.commits[OTHER].joinpath("bundle.json").write_text("{}")
        fake.moves_to = OTHER
        code, out, err = self.verify("--json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        assert (found["bundle"], found["passed"]) == (f"hf:lab/tiny@{COMMIT}", True)
        assert [row["precision"] for row in found["parity"]] == ["fp32"]

    def test_names_the_file_that_is_damaged_in_the_cache(self, fake: FakeHub) -> None:
        blob = (bundle_of("hf:lab/tiny@main").path / MODEL).resolve()
        blob.write_bytes(bytes(reversed(blob.read_bytes())))
        code, _, err = self.verify()
        assert (code, len(err.splitlines())) == (2, 2)
        assert f"Delete {blob}" in err

    def test_fetches_no_engine_that_is_not_trusted(self, fake: FakeHub) -> None:
        folder = fake.commits[COMMIT]
        manifest = load_bundle(folder).manifest
        key = EngineKey("tensorrt-rtx", "1.5", manifest.variants[0].file.sha256, "fp32", 64, (1, 8, 8), ("8.0+",))
        engine = Engine(FileRef("engines/tiny.engine", "a" * 64, 7), key)
        write_manifest(folder, replace(manifest, engines=(engine,)))
        code, out, _ = self.verify()
        assert code == 0
        assert "engines/tiny.engine: not fetched, not run: " in out
        assert not any("engine" in asked for asked in fake.asked)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:lab/tiny", "not hf:OWNER/NAME@REVISION"),
        ("hf:tiny@main", "not hf:OWNER/NAME@REVISION"),
        ("hf:lab/tiny/more@main", "not hf:OWNER/NAME@REVISION"),
        ("hf:../tiny@main", "cannot be fetched|no such repository"),
        ("hf:lab/tiny@", "not hf:OWNER/NAME@REVISION"),
        ("hf:lab/tiny@../../x", "no such revision|no such repository|cannot be fetched"),
        ("hf:lab/other@main", "no such repository, or it is private"),
        ("hf:lab/tiny@v9", "no such revision"),
    ],
)
def test_what_is_not_there_is_said(fake: FakeHub, name: str, message: str) -> None:
    with pytest.raises((UsageError, BundleNotFound), match=message):
        bundle_of(name)


def test_a_repository_that_is_no_bundle_is_said(fake: FakeHub) -> None:
    (fake.commits[COMMIT] / "bundle.json").unlink()
    with pytest.raises(BundleNotFound, match=r"not a model bundle \(no bundle.json in it\)"):
        bundle_of("hf:lab/tiny@main")


def test_without_the_extra_the_install_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="needs huggingface_hub") as refused:
        bundle_of("hf:lab/tiny@main")
    assert refused.value.hint == "pip install 'mtdp[hf]'"


def test_a_folder_is_never_looked_for_on_the_hub(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_fetched", lambda *_: pytest.fail("the hub was asked"))
    assert bundle_of(tiny_bundle).source == ""
    with pytest.raises(BundleNotFound):
        bundle_of("lab/tiny")


class TestWeightsApart:
    """Of a bundle of more than 2 GB: the cache holds links, and what they point to lies outside the snapshot."""

    @pytest.fixture
    def apart(self, fake: FakeHub) -> FakeHub:
        folder = fake.commits[COMMIT]
        assert save_model(onnx.load(folder / MODEL), None, folder / MODEL, 0) == folder / DATA
        self.sign(folder)
        return fake

    def sign(self, folder: Path) -> None:
        manifest = load_bundle(folder).manifest
        variant = replace(manifest.variants[0], file=file_ref(folder, MODEL), data=file_ref(folder, DATA))
        write_manifest(folder, replace(manifest, variants=(variant,)))

    @pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
    def test_come_along_and_engines_read_them_through_the_links(self, apart: FakeHub, engine: str) -> None:
        bundle = bundle_of("hf:lab/tiny@main")
        data = bundle.path / DATA
        assert data.is_symlink()
        assert bundle.path not in data.resolve().parents
        with backend_class(engine).load(bundle, "fp32", 4, 1) as loaded:
            assert list(data.resolve().parent.glob(".*")) == [], "what was put there to read it is gone"
            assert replay(loaded, bundle).cosine >= 0.999999

    def test_that_cannot_be_read_through_a_link_are_said(self, apart: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        bundle = bundle_of("hf:lab/tiny@main")
        monkeypatch.setattr("os.link", refuse)
        with pytest.raises(BackendError, match=r"its weights lie behind a link.*Operation not permitted") as refused:
            backend_class("openvino").load(bundle, "fp32", 4, 1)
        assert f"cp -rL {bundle.path} FOLDER" in refused.value.hint
        assert list((bundle.path / DATA).resolve().parent.glob(".*")) == []

    def test_need_no_network_once_they_are_in_the_cache(
        self, apart: FakeHub, monkeypatch: pytest.MonkeyPatch, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        bundle_of("hf:lab/tiny@main")
        apart.close()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        (outcome,) = mtdp_runtime.extract(make_slide(), tmp_path / "o", model="hf:lab/tiny@main")
        assert outcome.status == "done"
        with h5py.File(tmp_path / "o" / "slide.h5") as file:
            assert file.attrs["model_source"] == f"hf:lab/tiny@{COMMIT}"

    @pytest.mark.parametrize("where", ["repository", "cache"])
    def test_that_are_damaged_are_refused_by_their_name(self, apart: FakeHub, where: str) -> None:
        data = apart.commits[COMMIT] / DATA
        if where == "cache":
            data = (bundle_of("hf:lab/tiny@main").path / DATA).resolve()
        content = bytearray(data.read_bytes())
        content[-1] ^= 1
        data.write_bytes(content)
        bundle = bundle_of("hf:lab/tiny@main")
        with pytest.raises(
            BundleDigestMismatch, match=r"/model\.fp32\.onnx\.data: sha256 .*bundle\.json says"
        ) as refused:
            backend_class("onnxruntime").load(bundle, "fp32", 4, 1)
        blob = (bundle.path / DATA).resolve()
        assert str(blob) in refused.value.hint, "the cache would give the same file for ever"
        apart.commits[COMMIT].joinpath(DATA).write_bytes(bytes([*content[:-1], content[-1] ^ 1]))
        blob.unlink()
        again = bundle_of("hf:lab/tiny@main")
        assert again.checked(again.variant("fp32").file).is_file()

    def test_that_were_not_pushed_are_missed_at_once(self, apart: FakeHub) -> None:
        (apart.commits[COMMIT] / DATA).unlink()
        with pytest.raises(BundleNotFound, match=r"no model\.fp32\.onnx\.data in it") as refused:
            bundle_of("hf:lab/tiny@main")
        assert "whole folder" in refused.value.hint

    @pytest.mark.parametrize("location", ["{blob}", "../../blobs/{name}", "bundle.json", "/etc/passwd"])
    def test_are_read_from_the_one_name_in_the_snapshot(self, apart: FakeHub, location: str) -> None:
        """Even where another name would lead to the very same file."""
        blob = (bundle_of("hf:lab/tiny@main").path / DATA).resolve()
        folder = apart.commits[COMMIT]
        model = load_light(folder / MODEL)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data if is_apart(tensor) else ():
                if entry.key == "location":
                    entry.value = location.format(blob=blob, name=blob.name)
        (folder / MODEL).write_bytes(model.SerializeToString())
        self.sign(folder)
        apart.commits[OTHER] = folder
        bundle = bundle_of(f"hf:lab/tiny@{OTHER}")
        for engine in ("onnxruntime", "openvino"):
            with pytest.raises(BundleInvalid, match=r"a tensor lies at location .*, not in model\.fp32\.onnx\.data"):
                backend_class(engine).load(bundle, "fp32", 4, 1)

"""Slides behind URLs: fetched by --stage, from real servers on this machine that also fail, cut, stall and change."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import re
import ssl
import threading
import tomllib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import boto3
import h5py
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fsspec.registry import known_implementations
from typer.testing import CliRunner

import mtdp_runtime
from buckets import SECRET, a_bucket
from mtdp_runtime.cohort import remote, servers, staging
from mtdp_runtime.cohort.remote import fetch
from mtdp_runtime.cohort.requests import list_slides
from mtdp_runtime.cohort.servers import TransferFailed
from mtdp_runtime.cohort.staging import Staging
from mtdp_runtime.commands.bench import app as bench_app
from mtdp_runtime.commands.view import app as view_app
from mtdp_runtime.errors import UsageError
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.store import run_log
from mtdp_runtime.urls import SlideUrl, path_or_url, without_secrets
from support import extract, one_error

DATA = bytes(range(256)) * 4096  # 1 MiB


class Web:
    """A server of files, with a list of faults: each request for content takes the next one."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.faults: list[str] = []
        self.asked: list[str] = []  # the ranges of the requests for content
        self.ranges = True
        self.said: dict[str, str] = {}  # more headers of answers with content
        self.arrived = threading.Event()
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(head=True)

            def do_GET(self) -> None:
                self.answer(head=False)

            def answer(self, head: bool) -> None:
                name = self.path.partition("?")[0].lstrip("/")
                fault = web.faults.pop(0) if web.faults and not head else ""
                if name == "loop.bin":
                    self.send_response(302)
                    self.send_header("Location", self.path)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                if name not in web.files or fault == "503":
                    self.send_response(503 if fault else 404)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data, start = web.files[name], 0
                wanted = self.headers.get("Range", "")
                if wanted and web.ranges:
                    start = int(wanted.removeprefix("bytes=").partition("-")[0])
                start = start // 1000 * 1000 if fault == "earlier" else start + 1000 if fault == "later" else start
                self.send_response(206 if start else 200)
                if start and fault != "unsaid":
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                for header, value in ({} if head else web.said).items():
                    self.send_header(header, value)
                if tag := web.tags.get(name, "1"):
                    self.send_header("ETag", f'"{tag}"')
                if fault == "endless":
                    self.end_headers()
                    while not self.wfile.closed:
                        self.wfile.write(data)
                self.send_header("Content-Length", str(len(data) - start))
                if head and name.endswith(".html"):
                    self.send_header("Content-Type", "text/html; charset=utf-8")
                self.end_headers()
                if head:
                    return
                web.asked.append(wanted)
                if fault == "cut":
                    self.wfile.write(data[start : start + (len(data) - start) // 2])
                    web.arrived.wait(5)  # what is still on its way when a connection breaks is lost
                    self.close_connection = True
                    return
                if fault == "change":
                    web.files[name], web.tags[name] = data[::-1], "2"
                self.wfile.write(data[start:])

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, name: str) -> SlideUrl:
        url = path_or_url(f"http://{self.address}/{name}?token={SECRET}")
        assert isinstance(url, SlideUrl)
        return url


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr(servers, "WAITS_S", (0.01, 0.01, 0.01))
    served = Web()
    served.files["a.bin"] = DATA
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with a_bucket("slides"):
        yield "slides"


def put(name: str, content: bytes) -> None:
    boto3.client("s3").put_object(Bucket="slides", Key=name, Body=content)


def nothing(_: int = 0) -> None:
    pass


def same_features(a: Path, b: Path) -> None:
    with h5py.File(a) as one, h5py.File(b) as other:
        for name in ("features", "coords", "status"):
            assert one[name][:].tobytes() == other[name][:].tobytes()
        assert one.attrs["made_of"] == other.attrs["made_of"]
        assert one.attrs["slide_sample"] == other.attrs["slide_sample"] != ""


def test_a_folder_of_a_bucket_gives_the_bytes_of_the_local_run(
    bucket: str, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slides = [make_slide(f"{name}.tiff", seed=i) for i, name in enumerate("ab")]
    for slide in slides:
        put(f"case/{slide.name}", slide.read_bytes())
    put("case/bad.tiff", b"no slide")
    put("case/notes.txt", b"no slide either")
    shared = ("--model", tiny_bundle, "--json", "--backend", "onnxruntime")
    in_process(slides, tmp_path / "local", tiny_bundle, tmp_path / "stage")
    out = tmp_path / "far"
    result = extract(f"s3://{bucket}/case/", *shared, "--out", out, "--stage", tmp_path / "stage")
    lines = {Path(line["slide"]).stem: line for line in map(json.loads, result.stdout.splitlines())}
    assert {name: line["status"] for name, line in lines.items()} == {"a": "done", "b": "done", "bad": "failed"}
    assert lines["a"]["slide"] == f"s3://{bucket}/case/a.tiff"
    assert f"s3://{bucket}/case/bad.tiff: " in lines["bad"]["message"]
    assert result.returncode == 1
    for name in "ab":
        same_features(tmp_path / "local" / f"{name}.h5", out / f"{name}.h5")
    with h5py.File(out / "a.h5") as file:
        assert file.attrs["slide_path"] == f"s3://{bucket}/case/a.tiff"
    assert f"s3://{bucket}/case/bad.tiff," in (out / "failed.csv").read_text()
    assert list((tmp_path / "stage").iterdir()) == []
    said = (
        result.stdout
        + result.stderr
        + "".join(path.read_text(errors="replace") for path in out.rglob("*") if path.is_file())
    )
    assert SECRET not in said
    assert "Traceback" not in said
    again = in_process(out / "failed.csv", out, tiny_bundle, tmp_path / "stage")
    assert [one.status for one in again] == ["failed"], "failed.csv is a manifest"
    assert str(again[0].slide) == lines["bad"]["slide"]


def in_process(slides: object, out: Path, bundle: Path, stage: Path) -> list[Outcome]:
    return mtdp_runtime.extract(slides, out, model=bundle, stage=stage, backend="onnxruntime")  # type: ignore[arg-type]


def test_one_slides_transfer_fails_it_alone_and_a_token_is_nowhere(
    web: Web, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide, out = make_slide("a.tiff"), tmp_path / "out"
    web.files["a.tiff"] = slide.read_bytes()
    manifest = tmp_path / "list.csv"
    manifest.write_text(f"slide\n{web.url('gone.tiff').given}\nhttp://me:{SECRET}@{web.address}/a.tiff?sig={SECRET}\n")
    gone, done = in_process(manifest, out, tiny_bundle, tmp_path / "stage")
    assert (gone.status, done.status) == ("failed", "done")
    assert gone.message == f"http://{web.address}/gone.tiff: it is not there"
    assert gone.attempt == "", "nothing is remembered against the slide"
    in_process(slide, tmp_path / "local", tiny_bundle, tmp_path / "stage")
    same_features(tmp_path / "local" / "a.h5", out / "a.h5")
    for path in (path for path in out.rglob("*") if path.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path
    web.files["gone.tiff"] = make_slide("gone.tiff", seed=1).read_bytes()
    assert [one.status for one in in_process(manifest, out, tiny_bundle, tmp_path / "stage")] == ["done", "skipped"]
    web.files["a.tiff"] = make_slide("other.tiff", seed=2).read_bytes()
    changed = in_process(web.url("a.tiff"), out, tiny_bundle, tmp_path / "stage")[0]
    assert changed.status == "failed", "a finished file is of the slide as it was"


def test_a_finished_slide_is_not_fetched_again(
    web: Web, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    """Unless what its server states, the settings, or what the run is asked for say that it must be looked into."""
    web.files["a.tiff"], web.files["b.tiff"] = (
        make_slide(f"{name}.tiff", seed=i).read_bytes() for i, name in enumerate("ab")
    )
    out, slides = tmp_path / "out", [web.url("a.tiff"), web.url("b.tiff")]

    def again(fetched: int, *statuses: str, **options: object) -> None:
        web.asked.clear()
        found = mtdp_runtime.extract(
            slides,
            out,
            model=tiny_bundle,
            stage=tmp_path / "stage",
            backend="onnxruntime",
            **options,  # type: ignore[arg-type]
        )
        assert [one.status for one in found] == list(statuses)
        assert len(web.asked) == fetched

    again(2, "done", "done")
    before = (out / "a.h5").read_bytes()
    again(0, "skipped", "skipped")
    again(0, "skipped", "skipped", formats=["csv"])
    assert (out / "model-outputs-csv" / "b.csv").exists()
    again(2, "skipped", "skipped", check=1)
    again(2, "skipped", "skipped", report=True)
    again(0, "skipped", "skipped", report=True)
    again(2, "failed", "failed", stride_px=40)
    web.tags["a.tiff"] = "2"
    again(1, "skipped", "skipped")
    assert (out / "a.h5").read_bytes() == before
    web.files["b.tiff"], web.tags["b.tiff"] = make_slide("c.tiff", seed=2).read_bytes(), "2"
    again(2, "skipped", "failed")
    again(2, "skipped", "done", overwrite=True)
    again(1, "skipped", "skipped")
    web.tags["b.tiff"] = ""  # a size alone says too little
    (out / "b.h5").unlink()
    again(2, "skipped", "done")
    again(2, "skipped", "skipped")
    (out / "b.h5").write_bytes(b"damaged")
    again(2, "skipped", "failed")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_transfer_that_is_cut_goes_on_or_begins_again(web: Web, tmp_path: Path, ranges: bool) -> None:
    web.ranges, web.faults = ranges, ["cut", "503", "cut"]
    fetch(web.url("a.bin"), tmp_path / "a", lambda count: web.arrived.set() if count else None)
    assert (tmp_path / "a").read_bytes() == DATA
    assert web.asked[0] == ""
    assert all(re.fullmatch(r"bytes=[1-9]\d*-", one) for one in web.asked[1:])


def test_a_certificate_is_checked_and_one_of_ones_own_can_be_trusted(
    web: Web, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.files["a.tiff"] = make_slide("a.tiff").read_bytes()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own_certificate(tmp_path / "own.pem"))
    web.server.socket = context.wrap_socket(web.server.socket, server_side=True)
    url = f"https://{web.address}/a.tiff?token={SECRET}"
    arguments = (url, "--model", tiny_bundle, "--out", tmp_path / "o", "--stage", tmp_path / "s", "--no-report")
    arguments += ("--backend", "onnxruntime")
    refused = extract(*arguments)
    assert refused.returncode == 1
    assert "its certificate is not trusted" in refused.stderr
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "own.pem"))
    done = extract(*arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "a.h5").exists()
    assert SECRET not in refused.stdout + refused.stderr + done.stdout + done.stderr


def own_certificate(path: Path) -> Path:
    """Write a key and a certificate of 127.0.0.1 that it signed itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path.write_bytes(pem + certificate.public_bytes(serialization.Encoding.PEM))
    return path


def test_a_slide_that_changes_while_it_comes_is_fetched_again(web: Web, tmp_path: Path) -> None:
    web.faults = ["change"]
    fetch(web.url("a.bin"), tmp_path / "a", nothing)
    assert (tmp_path / "a").read_bytes() == DATA[::-1]
    assert web.asked == ["", ""]


def test_a_slide_that_changed_between_two_halves_is_no_mixture(web: Web, tmp_path: Path) -> None:
    web.faults = ["cut"]

    def arrived(count: int) -> None:
        if count:
            web.arrived.set()
            web.files["a.bin"], web.tags["a.bin"] = b"new" + DATA, "2"

    fetch(web.url("a.bin"), tmp_path / "a", arrived)
    assert (tmp_path / "a").read_bytes() == b"new" + DATA


def test_what_never_holds_still_or_never_comes_is_given_up(web: Web, tmp_path: Path) -> None:
    web.faults = ["503"] * 50
    with pytest.raises(TransferFailed, match="its server answers 503") as caught:
        fetch(web.url("a.bin"), tmp_path / "a", nothing)
    assert SECRET not in str(caught.value) + repr(caught.value.__cause__)
    web.faults = []

    def arrived(count: int) -> None:
        web.tags["a.bin"] = f"{len(web.asked)}x"
        web.files["a.bin"] = web.tags["a.bin"].encode() + DATA[2:]

    with pytest.raises(TransferFailed, match="changes while it is fetched"):
        fetch(web.url("a.bin"), tmp_path / "b", arrived)


def test_servers_of_one_name_that_each_have_their_own_etag_give_the_same_bytes_twice(web: Web, tmp_path: Path) -> None:
    def arrived(count: int) -> None:
        web.tags["a.bin"] = str(int(web.tags.get("a.bin", "1")) + 1)

    fetch(web.url("a.bin"), tmp_path / "a", arrived)
    assert (tmp_path / "a").read_bytes() == DATA
    assert web.asked == ["", ""]


@pytest.mark.parametrize(("fault", "then"), [("earlier", []), ("later", [""]), ("unsaid", [""])])
def test_an_answer_that_begins_elsewhere_leaves_no_hole(web: Web, tmp_path: Path, fault: str, then: list[str]) -> None:
    web.faults = ["cut", fault]
    fetch(web.url("a.bin"), tmp_path / "a", lambda count: web.arrived.set() if count else None)
    assert (tmp_path / "a").read_bytes() == DATA
    assert web.asked[2:] == then


def test_what_is_no_file_as_it_is_is_not_taken_for_the_slide(web: Web, tmp_path: Path) -> None:
    web.files["login.html"] = b"<html>"
    with pytest.raises(TransferFailed, match=r"sends a web page \(text/html\), such as one to log in"):
        fetch(web.url("login.html"), tmp_path / "a", nothing)
    web.said = {"Content-Encoding": "gzip"}
    with pytest.raises(TransferFailed, match="sends it compressed, unasked"):
        fetch(web.url("a.bin"), tmp_path / "b", nothing)
    web.said, web.faults = {}, ["endless"]
    fetch(web.url("a.bin"), tmp_path / "c", nothing)
    assert (tmp_path / "c").read_bytes() == DATA


def test_redirects_without_end_are_given_up_and_a_file_of_no_bytes_comes(web: Web, tmp_path: Path) -> None:
    with pytest.raises(TransferFailed, match="its server redirects without end") as caught:
        fetch(web.url("loop.bin"), tmp_path / "a", nothing)
    assert SECRET not in str(caught.value)
    web.files["%20b%23.bin"] = b""
    fetch(web.url("%20b%23.bin"), tmp_path / "b", nothing)
    assert (tmp_path / "b").read_bytes() == b""


def test_a_bucket_is_read_in_ranges(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put("big.svs", DATA)
    monkeypatch.setattr(remote, "_PIECE_BYTES", 300_000)
    pieces: list[int] = []
    fetch(SlideUrl(f"s3://{bucket}/big.svs"), tmp_path / "a", pieces.append)
    assert (tmp_path / "a").read_bytes() == DATA
    assert pieces == [300_000] * 3 + [len(DATA) - 900_000]
    for name, why in (("none.svs", "it is not there"), ("odd", "it is a folder: end its name with a /")):
        put("odd/a.svs", b"")
        with pytest.raises(TransferFailed, match=f"{name}: {why}"):
            fetch(SlideUrl(f"s3://{bucket}/{name}"), tmp_path / name, nothing)


@pytest.mark.parametrize("whole", [False, True])
def test_a_bucket_that_gives_less_or_more_than_asked_for_leaves_no_hole(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    put("big.svs", DATA)
    url = SlideUrl(f"s3://{bucket}/big.svs")
    system = servers.system_of(url)
    given = system.cat_file
    monkeypatch.setattr(remote, "_PIECE_BYTES", 300_000)
    monkeypatch.setattr(servers, "WAITS_S", (0.01,))

    def cat_file(path: str, start: int, end: int) -> object:
        return given(path) if whole else given(path, start=start, end=min(end, start + 200_000))

    monkeypatch.setattr(system, "cat_file", cat_file)
    if whole:
        with pytest.raises(TransferFailed, match="1048576 bytes came of the 300000 asked for"):
            fetch(url, tmp_path / "a", nothing)
    else:
        fetch(url, tmp_path / "a", nothing)
        assert (tmp_path / "a").read_bytes() == DATA


@pytest.mark.parametrize(
    "name", ["a b.svs", "ü-日本.svs", "h#1.svs", "p%20q.svs", "%zz.svs", "q?x=1.svs", "at@x.svs", "two//s.svs", "*.svs"]
)
def test_an_object_of_any_name_that_a_folder_lists_is_fetched_in_a_worker_too(
    bucket: str, tmp_path: Path, name: str
) -> None:
    put(f"odd/{name}", name.encode())
    (listed,) = [one for one in remote.list_folder(SlideUrl(f"s3://{bucket}/odd")) if one.given.endswith(f"odd/{name}")]
    fetch(pickle.loads(pickle.dumps(listed)), tmp_path / "a", nothing)
    assert (tmp_path / "a").read_bytes() == name.encode()


def test_a_mirax_slide_brings_its_folder_and_other_slides_of_many_files_are_refused(
    bucket: str, web: Web, tmp_path: Path
) -> None:
    for name in ("m.mrxs", "m/Slidedat.ini", "m/Data0000.dat"):
        put(f"mirax/{name}", name.encode())
    put("mirax/m2.svs", b"another")
    with Staging(tmp_path / "stage", print) as stage:
        slide = path_or_url(f"s3://{bucket}/mirax/m.mrxs")
        stage.begin(slide)
        local = stage.wait(slide, nothing)
        assert local is not None
        there = sorted(str(p.relative_to(local.parent)) for p in local.parent.rglob("*") if p.is_file())
        assert there == ["m.mrxs", "m/Data0000.dat", "m/Slidedat.ini"]
        assert (local.parent / "m/Slidedat.ini").read_bytes() == b"m/Slidedat.ini"
        for one in (web.url("m.mrxs"), path_or_url(f"s3://{bucket}/1.dcm")):
            stage.begin(one)
            with pytest.raises(TransferFailed, match=r"cannot be listed on the web|a slide of many"):
                stage.wait(one, nothing)


def test_a_slide_that_the_disk_cannot_hold_fails_alone(
    web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_SPARE_BYTES", 1 << 60)
    with Staging(tmp_path / "stage", print) as stage:
        stage.begin(web.url("a.bin"))
        with pytest.raises(TransferFailed, match=r"it needs 0\.00 GB of"):
            stage.wait(web.url("a.bin"), nothing)
    assert web.asked == []


def test_one_line_says_what_a_url_needs(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_slide: Callable[..., Path]
) -> None:
    result = extract("https://h/a.svs?token=" + SECRET, "--model", tiny_bundle, "--out", tmp_path / "o")
    assert result.returncode == 2
    assert one_error(result) == "error: https://h/a.svs: is fetched to a local disk"
    assert "--stage" in result.stderr
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    find = importlib.util.find_spec
    absent = ("s3fs", "gcsfs", "adlfs")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    for scheme, library in zip(("s3", "gs", "az"), absent, strict=True):
        with pytest.raises(UsageError, match=rf"^{scheme}://b/a\.svs: {scheme}:// needs {library}$") as caught:
            list_slides([Path(f"{scheme}://b/a.svs")])
        extra = caught.value.hint.removeprefix("pip install 'mtdp[").removesuffix("]'")
        assert library in "".join(extras[extra])
        assert known_implementations[scheme]["class"].startswith(f"{library}."), "what fsspec takes for it"
    for twice in (("s3://b/a.svs", "s3://b//a.svs"), ("https://h/a.svs?sig=1", f"https://h/a.svs?sig={SECRET}")):
        monkeypatch.undo()
        with pytest.raises(UsageError, match=r"^(s3://b|https://h)/a\.svs: named twice, with another query or number"):
            list_slides(list(map(path_or_url, twice)))
    with pytest.raises(UsageError, match="a folder of the web cannot be listed"):
        list_slides([path_or_url("https://h/folder/")])


def test_what_is_read_in_place_is_refused_behind_a_url(tmp_path: Path) -> None:
    url = f"https://me:{SECRET}@h/a.svs?sig={SECRET}"
    manifest = tmp_path / "list.csv"
    manifest.write_text(f"slide,mask\na.svs,{url}\n")
    for command, arguments in ((view_app, [url]), (bench_app, ["read", url])):
        refused = CliRunner().invoke(command, arguments).exception
        assert isinstance(refused, UsageError)
        assert str(refused) == "https://h/a.svs: only slides of mtdp-extract are fetched"
    for named, mask in (([manifest], None), ([tmp_path / "a.svs"], Path(url))):
        with pytest.raises(UsageError, match=r"https://h/a\.svs: only slides") as caught:
            list_slides(named, mask=mask)
        assert SECRET not in str(caught.value)


def test_a_url_as_a_path_has_no_secret_wherever_it_goes() -> None:
    given = f"https://me:{SECRET}@h:8/x/a.svs?sig={SECRET}//y#{SECRET}"
    url = path_or_url(given)
    assert isinstance(url, SlideUrl)
    assert (str(url), url.name, url.stem, url.scheme) == ("https://h:8/x/a.svs", "a.svs", "a", "https")
    assert os.fspath(url) == str(url)
    assert SECRET not in repr(url)
    assert str(url.with_suffix("")) == "https://h:8/x/a"
    again = pickle.loads(pickle.dumps(url))
    assert (again, again.given) == (url, given)
    assert without_secrets(f"--x={given} and {given}") == "--x=https://h:8/x/a.svs and https://h:8/x/a.svs"
    assert without_secrets(f"https://h/my slide.svs?sig={SECRET}") == "https://h/my slide.svs"
    with pytest.raises(UsageError, match=r"^s3://b/a\.svs: a bucket's URL takes no user"):
        path_or_url(f"s3://key:{SECRET}@b/a.svs")
    assert not isinstance(path_or_url("./s3:"), SlideUrl)
    assert str(path_or_url("s3://b/h#1.svs")) == run_log.absolute("s3://b/h#1.svs") == "s3://b/h#1.svs"
    assert run_log.absolute(url) == "https://h:8/x/a.svs"

"""--out on a bucket: what a folder would hold goes up slide by slide, whatever the way to the bucket does."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import pytest
from s3fs import S3FileSystem

import mtdp_runtime
from buckets import SECRET, Gate, a_bucket
from mtdp_runtime.cohort import objects, servers
from mtdp_runtime.cohort.servers import TransferFailed
from mtdp_runtime.errors import OutputUnwritable, UsageError
from mtdp_runtime.extraction.outcome import Outcome
from mtdp_runtime.files import working_folder
from mtdp_runtime.urls import SlideUrl
from support import extract, one_error

NAME = "results"


@pytest.fixture(scope="module")
def served() -> Iterator[Gate]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setattr(S3FileSystem, "retries", 1)
        patch.setattr(servers, "WAITS_S", (0.01, 0.01))
        with a_bucket(NAME, gated=True) as gate:
            yield gate


@pytest.fixture
def gate(served: Gate) -> Gate:
    served.faults, served.seen = [], []
    return served


class Machine:
    """A machine with a disk of its own."""

    def __init__(self, folder: Path, bundle: Path, out: str) -> None:
        self.stage, self.bundle, self.out = folder, bundle, f"s3://{NAME}/{out}"
        self.folder, _ = working_folder(Path(self.out), folder)

    def run(self, slides: object, **options: object) -> list[Outcome]:
        options = {"model": self.bundle, "backend": "onnxruntime", "stage": self.stage, **options}
        return mtdp_runtime.extract(slides, self.out, **options)  # type: ignore[arg-type]

    def holds(self) -> list[str]:
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())


@pytest.fixture
def machine(tiny_bundle: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], Machine]:
    return lambda name: Machine(tmp_path / name, tiny_bundle, request.node.name)


def statuses(outcomes: list[Outcome]) -> list[str]:
    return [one.status for one in outcomes]


def rows(path: Path) -> bytes:
    with h5py.File(path) as file:
        return b"".join(file[name][()].tobytes() for name in ("features", "coords", "status"))


def test_a_bucket_holds_what_a_folder_would_and_a_fresh_machine_reads_no_slide_again(
    gate: Gate, machine: Callable[[str], Machine], tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slides = [make_slide(f"{name}.tiff", seed=i) for i, name in enumerate("ab")]
    gate.client.put_object(Bucket=NAME, Key="slides/a.tiff", Body=slides[0].read_bytes())
    bad = tmp_path / "bad.tiff"
    bad.write_bytes(b"no slide")
    named = [f"s3://{NAME}/slides/a.tiff", slides[1], bad]
    asked = {"formats": ["csv"], "report": True}
    local = tmp_path / "folder"
    mtdp_runtime.extract(slides, local, model=tiny_bundle, backend="onnxruntime", **asked)  # type: ignore[arg-type]
    here = machine("here")
    found = here.run(named, **asked)
    assert statuses(found) == ["done", "done", "failed"]
    assert str(found[0].output) == f"{here.out}/a.h5"
    prefix = here.out.removeprefix(f"s3://{NAME}/")
    there = {name.removeprefix(f"{prefix}/"): content for name, content in gate.objects(NAME, prefix).items()}
    kept_here = {"run.jsonl", "report/index.html", "report/.index.lock"}
    kept_here |= {f"report/{path.name}" for path in (local / "report").glob("colours*")}
    made = {str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()} - kept_here
    logs = {name for name in there if name.startswith("runs/")}
    assert there.keys() == made | {".done/a.json", ".done/b.json"} | logs
    assert sorted(name.partition(".")[2] for name in logs) == ["failed.csv", "jsonl"]
    for name in "ab":
        (tmp_path / f"{name}.h5").write_bytes(there[f"{name}.h5"])
        assert rows(tmp_path / f"{name}.h5") == rows(local / f"{name}.h5")
    log = next(content for name, content in there.items() if name.endswith(".jsonl"))
    lines = [json.loads(line) for line in log.splitlines()]
    assert [line["output"] for line in lines[1:3]] == [f"{here.out}/a.h5", f"{here.out}/b.h5"]
    assert not [name for name in here.holds() if name.endswith((".h5", ".csv")) and name != "failed.csv"]
    assert all(SECRET.encode() not in content for content in there.values())
    assert not [path for path in here.stage.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]

    gate.seen.clear()
    assert statuses(machine("fresh").run(named[:2], **asked)) == ["skipped", "skipped"]
    gets = [said for said in gate.seen if said.startswith("GET") and "list-type" not in said]
    assert all(".done/" in said for said in gets), gets
    assert not [said for said in gate.seen if said.startswith(("PUT", "DELETE")) and "/runs/" not in said]


@pytest.mark.parametrize("what", ["503", "cut", "lost"])
def test_an_upload_that_breaks_is_tried_again(
    gate: Gate, machine: Callable[[str], Machine], make_slide: Callable[..., Path], what: str
) -> None:
    gate.faults = [(method, name, what) for name in (r"/a\.h5", r"/a\.json") for method in ("PUT", "HEAD")]
    gate.faults += [("PUT", r"/runs/", what)]
    here = machine("here")
    assert statuses(here.run(make_slide("a.tiff"))) == ["done"]
    assert gate.faults == []
    assert statuses(machine("fresh").run(make_slide("a.tiff"))) == ["skipped"]


@pytest.mark.parametrize(
    ("place", "answer", "said"),
    [
        ("a.h5", "503", "its server answers 503"),
        (".done/a.json", "403", "its server refuses it: credentials are taken"),
    ],
    ids=["features", "mark"],  # a test's name is in the URL
)
def test_what_cannot_go_up_fails_its_slide_for_this_run_alone(
    gate: Gate, machine: Callable[[str], Machine], make_slide: Callable[..., Path], place: str, answer: str, said: str
) -> None:
    here, slides = machine("here"), [make_slide(f"{name}.tiff", seed=i) for i, name in enumerate("ab")]
    gate.faults = [("PUT", re.escape(f"/{place}"), answer)] * 50
    first, second = here.run(slides)
    assert (first.status, second.status) == ("failed", "done")
    assert first.message.startswith(f"{here.out}/{place}: {said}")
    assert first.attempt == "", "nothing is remembered against the slide"
    gate.faults = []
    assert statuses(here.run(slides)) == ["skipped", "skipped"], "it was computed already"
    assert statuses(machine("fresh").run(slides)) == ["skipped", "skipped"]


def test_a_bucket_that_takes_nothing_any_more_ends_the_run_and_the_same_command_goes_on(
    gate: Gate, machine: Callable[[str], Machine], make_slide: Callable[..., Path]
) -> None:
    """As a full disk does: hours of computing would only fill this machine, too."""
    here, slides = machine("here"), [make_slide(f"{name}.tiff", seed=i) for i, name in enumerate("ab")]

    def expires() -> None:
        gate.faults = [("PUT", "", "400 ExpiredToken")] * 50

    gate.faults = [("PUT", r"/b\.h5", expires)]  # which still goes up: the mark does not
    with pytest.raises(OutputUnwritable) as ended:
        here.run(slides)
    said = f"--out {here.out}: cannot be written: {here.out}/runs/"
    assert re.fullmatch(rf"{said}\S+: its server refuses it: the credentials have expired", str(ended.value))
    assert ended.value.hint.endswith("run the same command again.")
    gate.faults = []
    prefix = here.out.removeprefix(f"s3://{NAME}/")
    assert list(gate.objects(NAME, f"{prefix}/.done/")) == [f"{prefix}/.done/a.json"]
    assert statuses(here.run(slides)) == ["skipped", "skipped"], "b was computed"
    assert len(gate.objects(NAME, f"{prefix}/.done/")) == 2


@pytest.mark.parametrize(
    ("method", "answer", "said"),
    [
        ("PUT", "403", "refuses it: credentials are taken from the environment"),
        ("PUT", "403 RequestTimeTooSkewed", "refuses it: the clock of this machine is wrong"),
        ("PUT", "507", "has no room for it"),
        ("HEAD", "400", "answers 400, as S3 does where credentials have expired"),
    ],
)
def test_what_a_bucket_says_is_said_in_our_words(gate: Gate, method: str, answer: str, said: str) -> None:
    gate.faults = [(method, "said", answer)] * 9
    with pytest.raises(TransferFailed, match=rf"said: its server {said}$") as failed:
        objects.put(b"", SlideUrl(f"s3://{NAME}/said"), lambda count: None)
    assert (failed.value.refused is None) == (method == "HEAD")


def test_a_disk_that_is_full_when_a_file_is_brought_back_ends_the_run(
    gate: Gate, machine: Callable[[str], Machine], make_slide: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = machine("here")
    gate.client.put_object(Bucket=NAME, Key=f"{here.out.removeprefix(f's3://{NAME}/')}/a.h5", Body=b"features")
    monkeypatch.setattr("mtdp_runtime.cohort.remote.fetch", no_space)
    with pytest.raises(OutputUnwritable, match=r"a\.h5: cannot be written: No space left on device"):
        here.run(make_slide("a.tiff"))


def no_space(url: object, target: Path, beat: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))


@pytest.mark.parametrize("name", ["h#1", "q?x=1", "50%25", "*", "a[1]", "a::b"])
def test_a_slide_of_any_name_goes_up_and_is_found_again(
    gate: Gate, machine: Callable[[str], Machine], make_slide: Callable[..., Path], name: str
) -> None:
    slide, bucket = make_slide("a.tiff"), f"s3://{NAME}/odd"
    put = objects.put(slide, SlideUrl(f"{bucket}/{name}.h5"), lambda count: None)
    assert objects.find(SlideUrl(f"{bucket}/{name}.h5"), lambda count: None) == put
    assert gate.objects(NAME, f"odd/{name}.h5") == {f"odd/{name}.h5": slide.read_bytes()}


def test_a_run_that_is_killed_before_it_says_that_a_slide_is_done(
    gate: Gate, machine: Callable[[str], Machine], make_slide: Callable[..., Path]
) -> None:
    here, slide = machine("here"), make_slide("a.tiff")
    code = "import sys; from mtdp_runtime import extract as e; e(*sys.argv[1:3], model=sys.argv[3], stage=sys.argv[4], "
    code += "backend='onnxruntime')"
    arguments = [slide, here.out, here.bundle, here.stage]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)])
    gate.faults = [("PUT", r"\.done/a\.json", lambda: os.kill(process.pid, signal.SIGKILL)), ("PUT", "json", "cut")]
    assert process.wait(60) == -signal.SIGKILL
    prefix = here.out.removeprefix(f"s3://{NAME}/")
    before = gate.objects(NAME, prefix)
    gate.faults = []
    gate.client.delete_object(Bucket=NAME, Key=f"{prefix}/.done/a.json")  # the request may still have come through
    assert statuses(machine("fresh").run(slide)) == ["skipped"]
    after = gate.objects(NAME, prefix)
    assert after[f"{prefix}/a.h5"] == before[f"{prefix}/a.h5"]
    assert f"{prefix}/.done/a.json" in after
    assert statuses(here.run(slide)) == ["skipped"]
    assert not [name for name in here.holds() if name.endswith(".h5")]


def test_what_lies_in_a_bucket_is_judged_as_in_a_folder(
    gate: Gate, machine: Callable[[str], Machine], make_slide: Callable[..., Path]
) -> None:
    """Other settings are refused or replaced, other formats made from it, and what somebody changed is found out."""
    slide, numbers = make_slide("a.tiff"), iter(range(20))

    def again(**options: object) -> Outcome:
        return machine(f"m{next(numbers)}").run(slide, **options)[0]

    done = again()
    assert done.status == "done"
    key = str(done.output).removeprefix(f"s3://{NAME}/")
    other = again(stride_px=40)
    assert other.status == "failed"
    assert "is not what would be made now: stride_px" in other.message
    assert again().status == "skipped", "it was not touched"
    assert again(formats=["csv"]).status == "skipped"
    assert f"{key.removesuffix('a.h5')}model-outputs-csv/a.csv" in gate.objects(NAME, key.removesuffix("a.h5"))
    assert again(stride_px=40, overwrite=True).status == "done"
    assert again(stride_px=40).status == "skipped"
    good = gate.objects(NAME, key)[key]
    gate.client.put_object(Bucket=NAME, Key=key, Body=good[:-100] + bytes(100))
    damaged = again(stride_px=40)
    assert damaged.status == "failed"
    assert damaged.message.startswith(f"{done.output}: ")
    assert damaged.hint.startswith("Delete the object")
    gate.client.delete_object(Bucket=NAME, Key=key)
    assert again(stride_px=40).status == "done"
    gate.client.put_object(Bucket=NAME, Key=f"{key.removesuffix('a.h5')}.done/a.json", Body=b"[]")
    assert again(stride_px=40).status == "skipped"


def test_every_scale_goes_up_and_a_second_run_fetches_and_puts_nothing(
    gate: Gate, machine: Callable[[str], Machine], tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide, asked = make_slide("a.tiff", levels=2), {"mpp": [0.5, 1.0], "formats": ["csv"], "report": True}
    gate.client.put_object(Bucket=NAME, Key="scales/a.tiff", Body=slide.read_bytes())
    mtdp_runtime.extract(slide, tmp_path / "o", model=tiny_bundle, backend="onnxruntime", **asked)  # type: ignore[arg-type]
    here, url = machine("here"), f"s3://{NAME}/scales/a.tiff"
    (outcome,) = here.run(url, **asked)
    assert [str(path) for path in outcome.outputs] == [f"{here.out}/mpp{mpp}/a.h5" for mpp in ("0.5", "1")]
    prefix = here.out.removeprefix(f"s3://{NAME}/")
    there = {name.removeprefix(f"{prefix}/"): content for name, content in gate.objects(NAME, prefix).items()}
    made = {str(path.relative_to(tmp_path / "o")) for path in tmp_path.glob("o/mpp*/**/*") if path.is_file()}
    made = {name for name in made if "/report/colours" not in name}
    assert made == {name for name in there if name.startswith("mpp")}
    assert len(made) == 2 * 5
    for mpp in ("0.5", "1"):
        (tmp_path / "there.h5").write_bytes(there[f"mpp{mpp}/a.h5"])
        assert rows(tmp_path / "there.h5") == rows(tmp_path / f"o/mpp{mpp}/a.h5")
    mark = json.loads(there[".done/a.json"])
    assert mark["keys"].keys() == {"mpp0.5/a.h5", "mpp1/a.h5"}
    assert mark["files"].keys() == made
    for again, scales in ((here, [0.5, 1.0]), (machine("fresh"), [0.5, 1.0]), (machine("one"), [1.0, 0.5])):
        gate.seen.clear()
        assert statuses(again.run(url, **{**asked, "mpp": scales})) == ["skipped"]
        gets = [said for said in gate.seen if said.startswith("GET") and "list-type" not in said]
        assert all(".done/" in said for said in gets), gets
        assert not [said for said in gate.seen if said.startswith(("PUT", "DELETE")) and "/runs/" not in said]
    gate.client.delete_object(Bucket=NAME, Key=f"{prefix}/mpp1/a.h5")
    assert statuses(machine("last").run(url, **asked)) == ["done"], "one scale is missing"
    assert f"{prefix}/mpp1/a.h5" in gate.objects(NAME, prefix)


def test_scales_that_a_slide_has_go_up_where_it_lacks_another(
    gate: Gate, machine: Callable[[str], Machine], make_slide: Callable[..., Path]
) -> None:
    here = machine("here")
    (outcome,) = here.run(make_slide("a.tiff"), mpp=[0.25, 0.5])
    assert outcome.status == "failed"
    assert "coarser than the 0.25 µm/px asked for" in outcome.message
    prefix = here.out.removeprefix(f"s3://{NAME}/")
    there = {name.removeprefix(f"{prefix}/") for name in gate.objects(NAME, prefix)}
    assert {name for name in there if not name.startswith("runs/")} == {"mpp0.5/a.h5", ".done/a.json"}
    assert not [name for name in here.holds() if name.endswith(".h5")]
    assert statuses(machine("fresh").run(make_slide("a.tiff"), mpp=[0.5, 1.0])) == ["done"]


def test_two_workers_of_the_command_put_up_slides_of_a_bucket(
    gate: Gate, machine: Callable[[str], Machine], make_slide: Callable[..., Path]
) -> None:
    for i, name in enumerate("ab"):
        gate.client.put_object(
            Bucket=NAME, Key=f"two/{name}.tiff", Body=make_slide(f"{name}.tiff", seed=i).read_bytes()
        )
    here = machine("here")
    arguments = [f"s3://{NAME}/two/", "--out", here.out, "--stage", here.stage, "--model", here.bundle]
    arguments += ["--no-report", "--backend", "onnxruntime", "--threads", 2, "--workers", 2]
    for _ in range(2):
        result = extract(*arguments)
        assert result.returncode == 0, result.stderr
        assert "2 of 2 slides done" in result.stdout
        assert f"{here.out}/b.h5" in result.stdout
        assert SECRET not in result.stdout + result.stderr
    assert "2 slides were done already" in result.stdout


def test_what_cannot_be_is_said_in_a_line(
    gate: Gate, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide, url = make_slide(), f"s3://{NAME}/x"
    with pytest.raises(UsageError, match=r"^--out https://h/x: a web server takes no files"):
        mtdp_runtime.extract(slide, f"https://h/x?token={SECRET}", model=tiny_bundle)
    with pytest.raises(OutputUnwritable, match=r"^--out s3://nobody/x: cannot be written: .*it is not there$"):
        mtdp_runtime.extract(slide, "s3://nobody/x", model=tiny_bundle, stage=tmp_path)
    for name in ("a?versionId=1", "a\\b", "a\nb"):  # a library would cut it off, or take it for a folder
        with pytest.raises(UsageError, match=r"a name in a bucket cannot hold '(\?versionId=|\\)"):
            mtdp_runtime.extract(make_slide(f"{name}.tiff"), url, model=tiny_bundle, stage=tmp_path)
    shared = (slide, "--model", tiny_bundle, "--out", url)
    assert one_error(extract(*shared, "--dry-run")).startswith(f"error: --out {url}: only a run")
    ray = extract(*shared, "--scheduler", "ray", "--ray-address", "auto", "--stage", tmp_path)
    assert one_error(ray) == f"error: --out {url}: the machines of --ray-address share a folder"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder, _ = working_folder(Path(url), tmp_path)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(UsageError, match="is not yours"):
        working_folder(Path(url), tmp_path)

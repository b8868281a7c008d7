"""Files that others made, and that are not what they say: one line that names the file, exit code 2, no traceback."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import mtdp.bundle_features
import warm
from hostile_models import endless_bundle
from mtdp.cli import app
from mtdp.errors import CheckpointError, MtdpError, PoolError, WeightsError
from mtdp.run_state import open_run
from mtdp.tasks import load_pool
from mtdp.transfer import load_extractor
from mtdp.weights import named_input, read_tensors

Make = Callable[..., Path]
ENDS_SOON = "import mtdp.bundle_features as b; b.LIMIT_S = 0.5; from mtdp.entry import main; main()"
TINY = ("--arch", "resnet18", "--init", "random", "--image-px", "32", "--batch-size", "4", "--precision", "fp32")
# What a stranger may put in the place of any value.
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 2**70, 10**400, 1e308, float("nan"), float("inf"), "", "x", "\x1b[2J\x07", "../../etc"),
    *([], [[]], ["a", 1], [float("nan")] * 3, [1e999, 0, 0], {}, {"a": {}}, "9" * 5000, "resnet999", "timm:nothing"),
)


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value of a JSON document."""
    if at:
        yield at
    for key in document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ():
        yield from places(document[key], (*at, key))


def mutant(document: dict[str, Any], rng: random.Random) -> str:
    """A JSON text that is the document but for one value, one key, or some of its bytes."""
    changed: Any = copy.deepcopy(document)
    *way, last = rng.choice([place for place in places(document) if place != ("schema_version",)])
    parent = changed
    for key in way:
        parent = parent[key]
    kind = rng.random()
    if kind < 0.2:
        del parent[last]
    elif kind < 0.9:
        parent[last] = rng.choice(ODD)
    text = json.dumps(changed)
    if kind < 0.9:
        return text
    return rng.choice([text[: rng.randrange(len(text))], "[" * 100_000, text.replace(":", " ", 1), "[]", "7", '""'])


class Header:
    """A safetensors file whose description is replaced in place: 45 MB of weights are written once."""

    ROOM = 150_000

    def __init__(self, path: Path, target: Path) -> None:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        self.header: dict[str, Any] = json.loads(data[8 : 8 + size])
        self.document: dict[str, Any] = json.loads(self.header["__metadata__"]["mtdp"])
        self.room = size + self.ROOM
        self.path = target
        target.write_bytes(self.room.to_bytes(8, "little") + bytes(self.room) + data[8 + size :])

    def describe(self, text: str) -> None:
        header = json.dumps({**self.header, "__metadata__": {"mtdp": text}}).encode()
        with self.path.open("r+b") as file:
            file.seek(8)
            file.write(header.ljust(self.room))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, make_task: Make) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    make_task(folder / "two", per_class=2)
    (folder / "pool.toml").write_text('[[task]]\nname = "two"\npath = "two"\n', "utf-8")
    return folder / "pool.toml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pool: Path) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    arguments = ["pretrain", "--pool", str(pool), "--out", str(out), "--iterations", "1", "--warmup", "0", *TINY]
    done = CliRunner().invoke(app, [*arguments, "-q"])
    assert done.exit_code == 0, done.output
    return out


def said_of(act: Callable[[], object], allowed: tuple[type[MtdpError], ...]) -> str:
    """What it raises, "" where nothing; anything but an error of ours comes through, as a traceback would."""
    try:
        act()
    except allowed as error:
        return str(error) if error.exit_code == 2 else f"exit code {error.exit_code}"
    return ""


def test_descriptions_of_checkpoints_that_state_anything(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 mutants: each is read as it is, or refused by its name, by all that read such a file."""
    file, rng = Header(run / "checkpoint.safetensors", tmp_path / "m.safetensors"), random.Random(0)
    for name in ("kaiming_normal_", "kaiming_uniform_"):  # most of the time of one that is read
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
    refused = 0
    for _ in range(100):
        file.describe(text := mutant(file.document, rng))
        for read in (lambda: load_extractor(str(file.path)), lambda: named_input(str(file.path), "resnet18", None)):
            said = said_of(read, (CheckpointError, WeightsError, mtdp.errors.UsageError))
            assert str(file.path) in said or not said, f"{said}: {text[:300]}"
            refused += bool(said)
    assert refused > 60, "many of them cannot be believed"


def test_states_of_runs_that_state_anything(run: Path, pool: Path, tmp_path: Path) -> None:
    """60 mutants: refused when the run is opened, or one that can be gone on from."""
    (tmp_path / "run").mkdir()
    file = Header(run / "state.safetensors", tmp_path / "run" / "state.safetensors")
    rng, command = random.Random(1), ["pretrain", "--pool", str(pool), "--out", str(file.path.parent), *TINY]
    refused = 0
    for number in range(60):
        file.describe(text := mutant(file.document, rng))
        said = said_of(
            lambda: open_run(file.path.parent, True, "pre-training"), (CheckpointError, mtdp.errors.UsageError)
        )
        assert str(file.path.parent) in said or not said, f"{said}: {text[:300]}"
        refused += bool(said)
        if number % 4:  # the whole command, for one in four
            continue
        done = CliRunner().invoke(app, [*command, "--iterations", "1", "--warmup", "0", "--resume", "-q"])
        assert done.exit_code in ((2,) if said else (0, 2)), f"{done.output} {done.exception!r}: {text[:300]}"
        assert "\x1b" not in done.output
        assert isinstance(done.exception, SystemExit | None)
    assert refused > 15


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "state.safetensors"])
def test_files_that_are_cut_or_overwritten(run: Path, tmp_path: Path, name: str) -> None:
    data, rng = (run / name).read_bytes(), random.Random(2)
    size = int.from_bytes(data[:8], "little")
    (tmp_path / "run").mkdir()
    broken = tmp_path / "run" / name
    heads = [b"", data[:7], data[: 8 + size // 2], (2**63).to_bytes(8, "little") + data[8:99], data[:-1], b"\x80\x04N."]
    heads += [data[:at] + rng.randbytes(9) + data[at + 9 : size + 5000] for at in rng.sample(range(size), 12)]
    for content in heads:
        broken.write_bytes(content)
        if name == "state.safetensors":
            said = said_of(lambda: open_run(broken.parent, True, "pre-training"), (CheckpointError,))
        else:
            said = said_of(lambda: load_extractor(str(broken), None), (CheckpointError, WeightsError))
        assert str(broken) in said


def test_pickles_that_are_none(tmp_path: Path) -> None:
    rng, path = random.Random(3), tmp_path / "weights.pth"
    for content in [b"", b"\x80", b"\x80\x04]q\x00.", b"PK\x03\x04", *(rng.randbytes(200) for _ in range(20))]:
        path.write_bytes(content)
        assert str(path) in said_of(lambda: read_tensors(path), (WeightsError,))


@pytest.mark.parametrize(
    "text",
    [
        "task = 3",
        "[[task]]",
        "task = [1]",
        '[[task]]\nname = 3\npath = "a"',
        '[[task]]\nname = "a"\npath = []',
        '[[task]]\nname = "a"\npath = "a"\nships = "yes"',
        '[[task]]\nname = "a"\npath = "a"\nleave_out_with = 3',
        "x = " + "9" * 5000,
        "x = " + "[" * 100_000,
        "\x00",
        "[[task",
    ],
)
def test_pools_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "pool.toml"
    path.write_text(text, "utf-8")
    assert str(path) in said_of(lambda: load_pool(path), (PoolError,))


def test_bundles_that_state_anything(tmp_path: Path) -> None:
    """40 mutants of bundle.json; what is left is a bundle whose outputs are looked at when they come."""
    bundle, rng = endless_bundle(tmp_path / "bundle"), random.Random(4)
    path, refused = bundle / "bundle.json", 0
    document = json.loads(path.read_text("utf-8"))
    for _ in range(40):
        path.write_text(text := mutant({"schema_version": 1, "mtdp": document["mtdp"]}, rng), "utf-8")
        said = said_of(lambda: load_extractor(str(bundle)), (WeightsError,))
        assert str(bundle) in said or not said, f"{said}: {text[:300]}"
        refused += bool(said)
    assert refused > 5


def test_a_bundle_that_never_answers_is_ended(tmp_path: Path, make_task: Make) -> None:
    bundle, task = endless_bundle(tmp_path / "endless"), make_task(tmp_path / "task", per_class=2)
    done = warm.run(ENDS_SOON, "probe", "--task", task, "--init", bundle, imports=warm.TRAINING)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: {bundle / 'model.fp32.onnx'}: one batch took more than 0.5 s",
        "hint: take bundles from people you trust",
    ]

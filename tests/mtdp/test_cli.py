"""The command line: whole outputs, and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import warm
from mtdp.checkpoint import load_checkpoint
from mtdp.cli import app
from mtdp.errors import UsageError

Make = Callable[..., Path]
TINY = ("--arch", "resnet18", "--init", "random", "--warmup", "0", "--batch-size", "4", "--image-px", "32")


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_pretrain_then_probe(pool_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, out, err = invoke("pretrain", "--pool", pool_file, "--out", run, "--iterations", 10, *TINY)
    assert (code, out) == (0, f"{run / 'checkpoint.safetensors'}\n")
    lines = err.splitlines()
    assert lines[0].startswith("resnet18 on 2 tasks, 40 images, ")
    assert lines[0].endswith("from random initialisation, seed 0")
    assert lines[1].startswith("training 10/10  loss ")
    assert lines[1].endswith(" left")
    code, out, err = invoke("probe", "--task", pool_file.parent / "three", "--init", run)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert (result["task"], result["metric"], result["images"]) == ("three", "accuracy", {"fit": 24, "test": 12})
    assert 0.0 <= result["score"] <= 1.0


def test_resume_goes_on(pool_file: Path, tmp_path: Path) -> None:
    common = ("pretrain", "--pool", pool_file, "--out", tmp_path / "run", *TINY)
    assert invoke(*common, "--iterations", 1)[0] == 0
    code, _, err = invoke(*common, "--iterations", 2)
    assert code == 2
    assert (
        err == f"error: {tmp_path / 'run'} holds a run already\nhint: continue with --resume, or give another --out\n"
    )
    code, _, err = invoke(*common, "--iterations", 2, "--resume")
    assert code == 0
    assert "resuming at iteration 1" in err


def test_splits_and_shippable_tasks(pool_file: Path, tmp_path: Path) -> None:
    options = ("--out", tmp_path / "run", "--iterations", 1, "--only-shippable", "--splits", "train")
    assert invoke("pretrain", "--pool", pool_file, *options, *TINY)[0] == 0
    _, info = load_checkpoint(tmp_path / "run")
    assert info.training["config"]["splits"] == ["train"]
    assert {name: told["images"] for name, told in info.training["tasks"].items()} == {"two": 8}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pool", "nowhere.toml"], "no pool file nowhere.toml"),
        (["--arch", "resnet51"], "unknown architecture 'resnet51'"),
        (["--init", "nothing"], "no weights 'nothing'"),
        (["--init", "mtdp"], "published no resnet18"),
        (["--batch-size", "1"], "batch_size is 1"),
        (["--splits", "train,dev"], "splits 'train,dev'"),
        (["--warmup", "99"], "warmup is 99"),
    ],
)
def test_wrong_usage_is_a_line_and_exit_code_2(pool_file: Path, tmp_path: Path, options: list[str], words: str) -> None:
    base = ["pretrain", "--pool", str(pool_file), "--out", str(tmp_path / "run"), "--iterations", "2", *TINY]
    code, out, err = invoke(*base, *options)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err
    assert len(err.splitlines()) <= 2


def test_click_refuses_what_is_no_option_with_the_same_code() -> None:
    assert invoke("pretrain", "--pool")[0] == 2
    assert invoke("pretrain", "--pool", "a", "--out", "b", "--precision", "int8")[0] == 2
    assert invoke("nothing")[0] == 2


def test_bad_data_is_a_line_and_exit_code_1_before_anything_is_written(pool_file: Path, tmp_path: Path) -> None:
    bad = next((pool_file.parent / "two" / "train" / "red").iterdir())
    bad.write_bytes(b"no image")
    code, out, err = invoke("pretrain", "--pool", pool_file, "--out", tmp_path / "run", *TINY)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {bad} is not a readable image")
    assert "hint: replace the file" in err
    assert not (tmp_path / "run").exists()
    for number in range(2):
        (pool_file.parent / "two" / f"x{number}\n.png").touch()
    code, _, err = invoke("pretrain", "--pool", pool_file, "--out", tmp_path / "run", *TINY)
    stray = [f"  {pool_file.parent / 'two'}/x{number}\\n.png would not be read" for number in range(2)]
    assert (code, err.splitlines()[1:3]) == (1, stray), "a line for each, whatever its name holds"


def test_help_lists_every_option_and_loads_no_torch() -> None:
    code, out, _ = invoke("pretrain", "--help")
    assert code == 0
    for option in ("--pool", "--warmup-lr", "--head-lr-multiplier", "--adaptation-batches", "--resume", "--splits"):
        assert option in out
    script = (
        "import sys; from mtdp.cli import app\n"
        "try: app(['pretrain', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_signal_is_the_exit_code(pool_file: Path, tmp_path: Path) -> None:
    """As a process of its own: SIGINT ends with 130 and a state to resume from."""
    import signal
    import time

    run = tmp_path / "run"
    options = ["--out", str(run), "--iterations", "100000", *TINY, "--arch", "timm:test_resnet"]
    main = "from mtdp.cli import main; main()"
    process = warm.start(main, "pretrain", "--pool", pool_file, *options, imports=warm.TRAINING)
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").stat().st_size:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "hint: continue with --resume"
    assert "Traceback" not in err
    assert load_checkpoint(run)[1].iteration >= 10


def test_options_reach_what_they_name(pool_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def stop(name: str) -> Callable[..., object]:
        def stopped(*args: object, **options: object) -> object:
            seen[name] = (args, options)
            raise UsageError("seen")

        return stopped

    monkeypatch.setattr("mtdp.pretrain.pretrain", stop("pretrain"))
    monkeypatch.setattr("mtdp.finetune.finetune_best", stop("finetune"))
    monkeypatch.setattr("mtdp.transfer.probe_task", stop("probe"))
    task = pool_file.parent / "three"
    invoke("pretrain", "--pool", pool_file, "--out", tmp_path / "run", "--checkpoint-every", 7, *TINY)
    assert seen["pretrain"][1]["checkpoint_every_s"] == 7.0  # type: ignore[index]
    tune = ("finetune", "--task", task, "--out", tmp_path / "t", "--arch", "resnet18", "--init", "random")
    invoke(*tune, "--adaptation-batches", 3)
    assert seen["finetune"][0][1].adaptation_batches == 3  # type: ignore[index]
    invoke("probe", "--task", task, "--arch", "resnet18", "--init", "random", "--image-px", 64)
    assert seen["probe"][0][0].preprocessing.image_px == 64  # type: ignore[index]


def test_fp16_is_a_precision_of_every_command(pool_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def stop(*args: object, **options: object) -> object:
        seen.append(options.get("precision") or getattr(getattr(args[0], "config", args[1]), "precision", None))
        raise UsageError("seen")

    for name in ("pretrain.pretrain", "finetune.finetune_best", "protocol.run.run_protocol", "transfer.probe_task"):
        monkeypatch.setattr(f"mtdp.{name}", stop)
    pool = ("--pool", pool_file, "--out", tmp_path / "out")
    task = ("--task", pool_file.parent / "three", "--arch", "resnet18", "--init", "random")
    for command in (
        ("pretrain", *pool, *TINY),
        ("finetune", *task, "--out", tmp_path / "out"),
        ("loto", *pool, *TINY),
        ("probe", *task),
    ):
        assert invoke(*command, "--precision", "fp16")[2] == "error: seen\n", command[0]
    assert seen == ["fp16"] * 4


def test_a_negative_seed_is_a_line(pool_file: Path, tmp_path: Path) -> None:
    common = ("--task", pool_file.parent / "three", "--arch", "resnet18", "--init", "random", "--seed", -1)
    for command in (("finetune", "--out", tmp_path / "t"), ("probe",)):
        assert invoke(*command, *common) == (2, "", "error: seed is -1, it must not be negative\n")

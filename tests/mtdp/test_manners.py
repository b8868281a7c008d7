"""What all commands of mtdp-train have in common, runs that do not disturb each other, and memory that runs out."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

import mtdp
from mtdp.cli import app
from mtdp.cli_options import ALIASES
from mtdp.devices import out_of_memory_said
from mtdp.errors import OutOfMemory, UsageError
from mtdp.finetune import FinetuneConfig, FinetuneSteps, finetune, finetune_best
from mtdp.pretrain import PretrainSteps, pretrain
from mtdp.pretrain_config import PretrainConfig
from mtdp.run_state import locked_run
from mtdp.tasks import load_pool

Make = Callable[..., Path]
COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]
TINY = PretrainConfig("timm:test_resnet", "random", 1, 0, batch_size=4, image_px=32, precision="fp32")


def test_the_commands() -> None:
    wanted = "breakhis convert evaluate finetune loto page pool pretrain probe split tasks"
    assert " ".join(COMMANDS) == wanted


def test_the_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"mtdp-train {mtdp.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_short_or_long_and_leaks_no_types(command: str) -> None:
    short, long = (CliRunner().invoke(app, [command, flag]) for flag in ("-h", "--help"))
    assert short.exit_code == long.exit_code == 0
    assert short.stdout == long.stdout
    for words in ("<bool>", "<int>", "<float>", "<str>", "<path>", "list[", "[]"):
        assert words not in long.stdout, words
    for option in ("--quiet", "-q", "--verbose", "-v"):
        assert option in long.stdout
    assert "Exit codes: 0: all is done; 1:" in long.stdout
    for alias in ALIASES:
        assert f"{alias} " not in long.stdout, "an alias is accepted, not shown"


def test_the_help_of_a_pool_shows_its_table() -> None:
    assert "[[task]]" in CliRunner().invoke(app, ["pretrain", "--help"]).stdout


def test_help_states_what_the_paper_chose() -> None:
    text = " ".join(CliRunner().invoke(app, ["pretrain", "--help"]).stdout.replace("│", " ").split())
    assert "The paper chose 1e-3 for ResNet-50 and 1e-4 for DenseNet-121" in text
    assert "The paper chose 1 for ResNet-50 and 5 for DenseNet-121" in text


def test_an_option_is_taken_by_the_names_of_the_other_commands(
    pool_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[PretrainConfig] = []

    def look(tasks: object, config: PretrainConfig, *args: object, **options: object) -> object:
        seen.append(config)
        raise UsageError("seen")

    monkeypatch.setattr("mtdp.pretrain.pretrain", look)
    base = ["pretrain", "--pool", str(pool_file), "--out", str(tmp_path / "r"), "--arch", "resnet18"]
    CliRunner().invoke(app, [*base, "--weights", "random", "--tile-px=96", "--batch", "5"])
    CliRunner().invoke(app, [*base, "--init=random", "--image-px", "96", "--batch-size=5"])
    assert seen[0] == seen[1]
    assert (seen[0].init, seen[0].image_px, seen[0].batch_size) == ("random", 96, 5)


def test_quiet_says_results_only_and_verbose_what_it_runs_on(pool_file: Path, tmp_path: Path) -> None:
    base = ["pretrain", "--pool", str(pool_file), "--arch", "resnet18", "--init", "random", "--iterations", "1"]
    base += ["--warmup", "0", "--batch-size", "4", "--image-px", "32"]
    quiet = CliRunner().invoke(app, [*base, "--out", str(tmp_path / "a"), "-q"])
    assert (quiet.stdout, quiet.stderr) == (f"{tmp_path / 'a' / 'checkpoint.safetensors'}\n", "")
    loud = CliRunner().invoke(app, [*base, "--out", str(tmp_path / "b"), "-v"])
    assert loud.stderr.startswith(f"mtdp {mtdp.__version__}; torch {torch.__version__}; ")
    assert loud.stdout == f"{tmp_path / 'b' / 'checkpoint.safetensors'}\n"


def test_a_run_in_a_folder_where_another_one_works_is_refused(pool_file: Path, tmp_path: Path) -> None:
    tasks = load_pool(pool_file)
    tuning = FinetuneConfig("timm:test_resnet", "random", epochs=1, batch_size=4, image_px=32, precision="fp32")
    for start in (
        lambda out: pretrain(tasks, TINY, out, quiet=True),
        lambda out: finetune(tasks[0], tuning, out, quiet=True),
        lambda out: finetune_best(tasks[0], tuning, out, (1e-3,), quiet=True),
    ):
        with locked_run(tmp_path / "run"), pytest.raises(UsageError, match="another process is working in"):
            start(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"], "nothing else was touched"
    pretrain(tasks, TINY, tmp_path / "run", quiet=True)


def test_a_training_holds_the_lock_while_it_trains(pool_file: Path, tmp_path: Path) -> None:
    held: list[bool] = []

    def look(*args: object, **options: object) -> object:
        with (tmp_path / "run" / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held.append(False)
            except BlockingIOError:
                held.append(True)
        raise UsageError("seen")

    with pytest.raises(UsageError, match="seen"):
        pretrain(load_pool(pool_file), TINY, tmp_path / "run", quiet=True, steps=PretrainSteps(look))  # type: ignore[arg-type]
    config = FinetuneConfig("timm:test_resnet", "random", epochs=1, batch_size=4, image_px=32, precision="fp32")
    with pytest.raises(UsageError, match="seen"):
        finetune(load_pool(pool_file)[0], config, tmp_path / "run", quiet=True, steps=FinetuneSteps(look))  # type: ignore[arg-type]
    assert held == [True, True]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_a_line_that_names_the_option(error: Exception, pool_file: Path, tmp_path: Path) -> None:
    def run_out(*args: object, **options: object) -> object:
        raise error

    with pytest.raises(OutOfMemory, match="pre-training: out of memory") as caught:
        pretrain(load_pool(pool_file), TINY, tmp_path / "a", quiet=True, steps=PretrainSteps(run_out))  # type: ignore[arg-type]
    assert "--batch-size" in caught.value.hint
    assert "\n" not in caught.value.message
    config = FinetuneConfig("timm:test_resnet", "random", epochs=1, batch_size=4, image_px=32, precision="fp32")
    with pytest.raises(OutOfMemory) as caught:
        finetune(load_pool(pool_file)[0], config, tmp_path / "b", quiet=True, steps=FinetuneSteps(run_out))  # type: ignore[arg-type]
    assert "--image-px" in caught.value.hint


def test_other_errors_are_not_taken_for_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_said("x", "y"):
        raise RuntimeError("shapes do not fit")


def test_a_real_allocation_that_fails_is_said() -> None:
    with pytest.raises(OutOfMemory), out_of_memory_said("x", "y"):
        torch.empty(1 << 50)


def test_a_checkpoint_says_what_was_done_and_not_what_is_usual() -> None:
    from mtdp.choices import finetuning_choices, pretraining_choices

    plain = pretraining_choices(replace(TINY, momentum=0.0, splits=("train",), train_only=("a", "b")))
    assert plain["optimiser"] == "SGD, no momentum, no weight decay, no schedule of the rates"
    assert plain["splits of the pool's tasks"] == "train; train alone of a, b, judged by joint training"
    assert plain["batch norm"].startswith("not adapted beforehand;"), "random weights have nothing to keep"
    assert "DenseNet" not in plain
    paper = pretraining_choices(PretrainConfig("densenet121"))
    assert paper["optimiser"] == "SGD, momentum 0.9 without Nesterov, no weight decay, no schedule of the rates"
    assert paper["batch norm"].startswith("adapted once, before the warm-up, on 20 batches of training views;")
    assert paper["rate of the heads in the warm-up"].startswith("0.001")
    assert paper["momentum after the warm-up"] == "starts anew"
    assert "without its last ReLU" in paper["DenseNet"]
    other = pretraining_choices(
        PretrainConfig(warmup=0, optimiser="adamw", schedule="cosine", lr_rise=7, drop_path=0.2, adaptation_batches=3)
    )
    wanted = "a rise of 7 iterations and a fall to 0 by a cosine, drop path 0.2"
    assert other["optimiser"] == f"AdamW, betas 0.9 and 0.999, no weight decay, {wanted}"
    assert other["momentum after the warm-up"] == other["rate of the heads in the warm-up"] == "there was no warm-up"
    assert other["batch norm"].startswith("adapted once, before training, on 3 batches")
    tuned = finetuning_choices(FinetuneConfig("resnet18", "random", momentum=0.5, adaptation_batches=4))
    assert tuned["optimiser"].startswith("SGD, momentum 0.5 without Nesterov, no weight decay")
    assert tuned["batch norm"] == "not adapted beforehand"

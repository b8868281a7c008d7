"""Every option that decides a result reaches the step that it names: recorded by fakes, nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mtdp.cli import app
from mtdp.errors import UsageError
from mtdp.finetune import FinetuneConfig
from mtdp.pretrain_config import PretrainConfig
from mtdp.protocol.config import ProtocolConfig

Call = tuple[tuple[Any, ...], dict[str, Any]]  # type: ignore[explicit-any]
Asked = Callable[..., Call]
# Of each option another value than its default: an option that is dropped on the way shows.
TRAINING = {
    "arch": "resnet18",
    "init": "random",
    "iterations": 77,
    "warmup_lr": 0.03,
    "batch_size": 6,
    "image_px": 96,
    "precision": "bf16",
    "adaptation_batches": 4,
}
OWN = {
    "warmup": 8,
    "lr": 0.02,
    "head_lr_multiplier": 3.0,
    "seed": 5,
    "splits": ("train",),
    "optimiser": "adamw",
    "weight_decay": 0.04,
    "schedule": "cosine",
    "lr_rise": 9,
    "layer_decay": 0.6,
    "drop_path": 0.2,
}
GRID = {
    "evaluate": ("two", "three"),
    "lrs": (0.02, 0.05),
    "head_lr_multipliers": (2.0, 3.0),
    "warmups": (8, 9),
    "seeds": 2,
    "finetune": ("three",),
    "finetune_lrs": (0.07, 0.08),
    "finetune_epochs": 11,
    "scratch": True,
    "joint": True,
    "release": True,
}
TUNING = {
    "arch": "resnet18",
    "init": "random",
    "epochs": 12,
    "batch_size": 6,
    "image_px": 96,
    "seed": 5,
    "precision": "bf16",
    "adaptation_batches": 4,
}


def as_options(values: dict[str, object]) -> list[str]:
    """As they are typed: a list as one option again and again, --splits with commas."""
    words = []
    for name, value in values.items():
        option = f"--{name.removesuffix('s') if isinstance(value, tuple) else name}".replace("_", "-")
        if name == "splits":
            words += ["--splits", ",".join(map(str, value))]  # type: ignore[call-overload]
        elif isinstance(value, bool):
            words.append(option)
        else:
            for one in value if isinstance(value, tuple) else (value,):
                words += [option, str(one)]
    return words


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """asked(step, words): what a command calls a step with."""

    def ask(step: str, *words: object) -> Call:
        found: list[Call] = []

        def stopped(*args: object, **options: object) -> object:
            found.append((args, options))
            raise UsageError("seen")

        monkeypatch.setattr(f"mtdp.{step}", stopped)
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.stderr.endswith("error: seen\n"), result.output
        return found[0]

    return ask


def test_every_option_of_pretrain_is_in_its_configuration(asked: Asked, pool_file: Path, tmp_path: Path) -> None:
    values = {**TRAINING, **OWN}
    (_, config, _), _ = asked(
        "pretrain.pretrain", "pretrain", "--pool", pool_file, "--out", tmp_path / "run", *as_options(values)
    )
    assert asdict(config) == {**asdict(PretrainConfig()), **values}
    assert {name for name, value in asdict(PretrainConfig()).items() if asdict(config)[name] == value} == {
        "momentum",  # which have no option
        "train_only",
        "compile",
    }


def test_every_option_of_loto_is_in_its_configuration(asked: Asked, pool_file: Path, tmp_path: Path) -> None:
    values = {**TRAINING, **GRID}
    (protocol, _), _ = asked(
        "protocol.run.run_protocol", "loto", "--pool", pool_file, "--out", tmp_path / "run", *as_options(values)
    )
    assert asdict(protocol.config) == values
    assert not [name for name, value in asdict(ProtocolConfig()).items() if values[name] == value]


def test_every_option_of_finetune_is_in_its_configuration(asked: Asked, pool_file: Path, tmp_path: Path) -> None:
    words = [*as_options(TUNING), "--lr", "0.2", "--lr", "0.1"]
    task = ["--task", pool_file.parent / "three", "--out", tmp_path / "run"]
    (_, config, _, rates), _ = asked("finetune.finetune_best", "finetune", *task, *words)
    assert asdict(config) == {**asdict(FinetuneConfig("resnet18")), **TUNING}
    assert rates == (0.2, 0.1)


def test_the_options_of_breakhis_are_in_its_configuration(asked: Asked, tmp_path: Path) -> None:
    values = {name: value for name, value in TUNING.items() if name != "adaptation_batches"}
    words = [*as_options(values), "--lr", "0.2", "--finetune", "--out", tmp_path / "run"]
    (config, source, out, rates), _ = asked("breakhis.finetune_folds", "breakhis", tmp_path, *words)
    assert asdict(config) == {**asdict(FinetuneConfig("resnet18")), **values}
    assert (source, out, rates) == (tmp_path, tmp_path / "run", (0.2,))
    colour = ("--init", "colour", "--precision", "bf16", "--seed", 5)
    assert asked("breakhis.probe_folds", "breakhis", tmp_path, *colour)[0][2:] == ("bf16", 5)


def test_a_probe_is_of_its_weights_seed_and_precision(asked: Asked, pool_file: Path) -> None:
    words = ("--init", "random", "--arch", "resnet18", "--image-px", 96, "--seed", 5, "--precision", "bf16")
    command = ("probe", "--task", pool_file.parent / "three", *words)
    (_, task), options = asked("transfer.probe_task", *command)
    assert (task.name, options) == ("three", {"seed": 5, "precision": "bf16"})
    assert asked("transfer.load_extractor", *command)[0] == ("random", "resnet18", 5, 96)


def test_an_evaluation_is_of_its_encoders_seed_and_precision(
    asked: Asked, pool_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--init", "a", "--init", "b", "--bundle", "c", "--arch", "resnet18", "--image-px", 96)
    command = ("evaluate", "--task", pool_file.parent / "three", *words, "--seed", 5, "--precision", "bf16")
    assert asked("evaluation_sources.named_sources", *command)[0] == ([Path("c")], ["a", "b"], "resnet18", 5, 96)
    monkeypatch.setattr("mtdp.evaluation_sources.named_sources", lambda *args: {"a": "its features"})
    (task, sources, precision, seed), _ = asked("evaluate.evaluate_task", *command)
    assert (task.name, sources, precision, seed) == ("three", {"a": "its features"}, "bf16", 5)

"""One snapshot of everything that decides a result where the user says nothing: the paper's values, and ours."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mtdp import breakhis, evaluate, few_labels, metrics, sampling, transfer
from mtdp.cli import app
from mtdp.converters import camelyon16, folders, masks, mitosis, splits, warwick, windows
from mtdp.finetune import LEARNING_RATES, FinetuneConfig, finetune_best
from mtdp.preprocess import Preprocessing
from mtdp.pretrain import pretrain
from mtdp.pretrain_config import PretrainConfig
from mtdp.protocol.config import ProtocolConfig
from mtdp.scores import head_scores
from mtdp.transfer import fit_svm

Make = Callable[..., Path]


def constants(module: object) -> dict[str, Any]:  # type: ignore[explicit-any]
    """The numbers and tuples of numbers that a module states in capitals."""
    found = {name: value for name, value in vars(module).items() if name.isupper() and not name.startswith("_")}
    kinds = (int, float, tuple)
    return {name: value for name, value in found.items() if isinstance(value, kinds) and not isinstance(value, bool)}


def defaults(function: Callable[..., Any]) -> dict[str, Any]:  # type: ignore[explicit-any]
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


PRETRAINING = {
    "arch": "resnet50",
    "init": "imagenet",
    "iterations": 50_000,
    "warmup": 5_000,
    "warmup_lr": 1e-3,
    "lr": 1e-3,
    "head_lr_multiplier": 1.0,
    "momentum": 0.9,
    "batch_size": 64,
    "image_px": 224,
    "seed": 0,
    "precision": "auto",
    "splits": ("train", "val"),
    "train_only": (),
    "adaptation_batches": 20,
    "optimiser": "sgd",
    "weight_decay": 0.0,
    "schedule": "constant",
    "lr_rise": 0,
    "layer_decay": 1.0,
    "drop_path": 0.0,
    "compile": False,
}
FINETUNING = {
    "arch": "resnet50",
    "init": "imagenet",
    "lr": 1e-4,
    "epochs": 100,
    "momentum": 0.9,
    "batch_size": 64,
    "image_px": 224,
    "seed": 0,
    "precision": "auto",
    "adaptation_batches": 0,
}
PROTOCOL = {
    "arch": "resnet50",
    "init": "imagenet",
    "evaluate": (),
    "lrs": (1e-3, 1e-4, 1e-5, 1e-6),
    "head_lr_multipliers": (1.0, 5.0, 10.0),
    "warmups": (5_000, 0),
    "seeds": 5,
    "iterations": 50_000,
    "warmup_lr": 1e-3,
    "batch_size": 64,
    "image_px": 224,
    "precision": "auto",
    "adaptation_batches": 20,
    "finetune": (),
    "finetune_lrs": (1e-3, 1e-4, 1e-5, 1e-6),
    "finetune_epochs": 100,
    "scratch": False,
    "joint": False,
    "release": False,
}


def test_the_configurations_are_the_papers() -> None:
    assert asdict(PretrainConfig()) == PRETRAINING
    assert asdict(FinetuneConfig("resnet50")) == FINETUNING
    assert asdict(ProtocolConfig()) == PROTOCOL
    assert asdict(Preprocessing()) == {
        "image_px": 224,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bilinear",
    }
    assert LEARNING_RATES == (1e-3, 1e-4, 1e-5, 1e-6)


@pytest.mark.parametrize(
    ("arch", "lr", "multiplier"), [("resnet50", 1e-3, 1.0), ("densenet121", 1e-4, 5.0), ("resnet18", 1e-4, 1.0)]
)
def test_rate_and_multiplier_are_those_that_the_paper_chose_for_the_architecture(
    arch: str, lr: float, multiplier: float
) -> None:
    config = PretrainConfig(arch)
    assert (config.lr, config.head_lr_multiplier) == (lr, multiplier)
    own = PretrainConfig(arch, lr=0.5, head_lr_multiplier=3.0)
    assert (own.lr, own.head_lr_multiplier) == (0.5, 3.0)


def test_a_protocol_trains_what_it_says() -> None:
    protocol = ProtocolConfig()
    combination = protocol.combinations()[7]
    asked = {"lr": combination.lr, "head_lr_multiplier": combination.head_lr_multiplier, "warmup": combination.warmup}
    assert asdict(protocol.pretraining(combination, 3)) == {**PRETRAINING, **asked, "seed": 3}
    assert asdict(protocol.finetuning("RUN", 4, 1e-5)) == {**FINETUNING, "init": "RUN", "seed": 4, "lr": 1e-5}


def test_the_svm_its_grid_and_its_folds() -> None:
    assert constants(transfer) == {"C_GRID": tuple(10.0**power for power in range(-10, 1)), "FOLDS": 5}
    x = np.array([[0.0], [0.1], [1.0], [1.1]], np.float32)
    svm, _ = fit_svm(x, np.array([0, 0, 1, 1]), 0.25, 11)
    assert svm.get_params() == {
        "C": 0.25,
        "class_weight": None,
        "dual": "auto",
        "fit_intercept": True,
        "intercept_scaling": 1,
        "loss": "squared_hinge",
        "max_iter": 1000,
        "multi_class": "ovr",
        "penalty": "l2",
        "random_state": 11,
        "tol": 1e-4,
        "verbose": 0,
    }
    probe = {"seed": 0, "fit_on": ("train", "val"), "score_on": "test", "classifier": None}
    assert defaults(transfer.judge_features) == probe
    assert defaults(transfer.probe_task) == {**probe, "precision": "auto"}
    assert defaults(head_scores) == {"batch_size": 32}
    assert defaults(pretrain)["checkpoint_every_s"] == 300.0
    assert defaults(finetune_best)["learning_rates"] == LEARNING_RATES


def test_the_evaluation() -> None:
    assert constants(metrics) == {"REPLICATES": 2000, "LEVEL": 0.95}
    assert constants(evaluate) == {"FEW": (1, 5, 20), "DRAWS": 20, "NEIGHBOURS": 20, "FIRST": 5}
    assert defaults(few_labels.nearest_neighbours) == {"neighbours": 20}
    assert constants(breakhis) == {
        "MAGNIFICATIONS": (40, 100, 200, 400),
        "FOLDS": 5,
        "CLASSES": ("benign", "malignant"),
        "VAL_SHARE": 0.1,
    }
    assert constants(sampling) == {"TRAINING": 0, "ADAPTATION": 1, "EPOCHS": 2}


def test_the_patch_rules() -> None:
    """The paper's supplement; a shift of a quarter is ours (it states none)."""
    assert constants(camelyon16) == {
        "SIDE_PX": 768,
        "OUT_PX": 384,
        "TUMOUR_SHARE": 0.10,
        "TISSUE_SHARE": 0.25,
        "MOST_A_CLASS": 1000,
        "CELL_PX": 32,
    }
    assert constants(windows) == {"SHIFT_SHARE": 1 / 4, "MARGIN_SHARE": 1 / 16, "WINDOWS_AN_OBJECT": 10}
    assert constants(masks) == {
        "NUCLEI_SIDE_PX": 250,
        "NUCLEI_SHARE": 0.05,
        "EPITHELIUM_SIDE_PX": 200,
        "EPITHELIUM_SHARE": 0.10,
    }
    assert {name: value for name, value in constants(folders).items() if isinstance(value, int)} == {
        "LYMPHOMA_SIDE_PX": 384,
        "BACH_SIDE_PX": 512,
    }
    assert constants(warwick) == {"SIDE_PX": 100}
    assert constants(mitosis) == MITOSIS
    assert splits._TRIES == 100


MITOSIS = {"MITOS_SIDE_PX": 323, "SIDE_PX": 250}


def test_the_commands_defaults_are_those_of_the_configurations(
    pool_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written twice, so that --help needs no torch: they must be equal."""
    seen: dict[str, Any] = {}  # type: ignore[explicit-any]

    class Seen(Exception):
        pass

    def look(name: str) -> Callable[..., object]:
        def looked(*args: Any, **options: Any) -> object:  # type: ignore[explicit-any]
            seen[name] = (args, options)
            raise Seen

        return looked

    monkeypatch.setattr("mtdp.pretrain.pretrain", look("pretrain"))
    monkeypatch.setattr("mtdp.finetune.finetune_best", look("finetune"))
    monkeypatch.setattr("mtdp.protocol.run.run_protocol", look("loto"))
    pool = ["--pool", str(pool_file), "--out", str(tmp_path / "run")]
    CliRunner().invoke(app, ["pretrain", *pool])
    CliRunner().invoke(app, ["loto", *pool])
    task = ["--task", str(pool_file.parent / "three"), "--out", str(tmp_path / "t")]
    CliRunner().invoke(app, ["finetune", *task, "--init", "imagenet", "--arch", "resnet50"])
    assert asdict(seen["pretrain"][0][1]) == PRETRAINING
    assert asdict(seen["loto"][0][0].config) == PROTOCOL
    assert asdict(seen["finetune"][0][1]) == FINETUNING
    assert seen["finetune"][0][3] == LEARNING_RATES
    CliRunner().invoke(app, ["pretrain", *pool, "--arch", "densenet121"])
    assert (seen["pretrain"][0][1].lr, seen["pretrain"][0][1].head_lr_multiplier) == (1e-4, 5.0)

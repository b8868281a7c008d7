"""What the paper leaves open, and what was done here: written beside every result, so that a reader need not ask.

Nothing reads it back. The values come from the configuration of the run, so that they say what was done, not what is
usual. What has an option of its own and no more to say (image_px, ...) stands in the settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from mtdp.finetune import FinetuneConfig
    from mtdp.pretrain_config import PretrainConfig
    from mtdp.protocol.config import ProtocolConfig

TRANSFER_CHOICES: Final = {
    "SVM": "liblinear, L2-regularised squared hinge loss, one against the rest, max_iter 1000",
    "features": "of the central square, not scaled",
    "C": "best mean score of the folds by the task's metric; the smallest of equals",
}


def pretraining_choices(config: PretrainConfig) -> dict[str, str]:
    """What was done in a pre-training where the paper is silent."""
    adapted = config.adaptation_batches if config.init != "random" else 0
    warm = config.warmup > 0
    choices = {
        "optimiser": _optimiser(config),
        "momentum after the warm-up": "starts anew" if warm else "there was no warm-up",
        "rate of the heads in the warm-up": (
            f"{config.warmup_lr:g}; the multiplier tau is not applied" if warm else "there was no warm-up"
        ),
        "heads without a sample in a batch": "left alone, and so is their momentum",
        "batch norm": _batch_norm(adapted, "before the warm-up, " if warm else "before training, ")
        + "; when the backbone is trained, statistics of the mixed batch",
        "splits of the pool's tasks": " and ".join(config.splits)
        + (f"; train alone of {', '.join(config.train_only)}, judged by joint training" if config.train_only else ""),
        "weights kept": "of the last iteration",
    }
    if config.arch.startswith("densenet"):
        choices["DenseNet"] = "without its last ReLU, in training and in its features"
    return choices


def finetuning_choices(config: FinetuneConfig) -> dict[str, str]:
    """What was done in a fine-tuning where the paper is silent."""
    adapted = config.adaptation_batches if config.init != "random" else 0
    return {
        "optimiser": f"SGD, {_momentum(config.momentum)}, no weight decay, no schedule, one rate for backbone and head",
        "batch norm": _batch_norm(adapted, "before fine-tuning, "),
        "augmentation": "as in pre-training: square crop and flips",
        "rate and epoch": "of the best score on val by the task's metric; the first of equals",
    }


def protocol_choices(config: ProtocolConfig) -> dict[str, Any]:
    """What is done in a protocol run where the paper is silent."""
    several = len(config.combinations()) > 1
    transfer = {**TRANSFER_CHOICES, "standard deviation": "of the sample (ddof 1); 0 for a single value"}
    if several:
        transfer["ranks"] = "within one network; equals share the mean of their ranks"
    if several and config.joint:
        transfer["combination of joint training"] = (
            "of the best mean score on the task's own val, which is not trained on"
        )
    choices: dict[str, Any] = {
        "pre-training": {
            combination.name: pretraining_choices(config.pretraining(combination, 0))
            for combination in config.combinations()
        },
        "transfer": transfer,
    }
    if config.finetune:
        choices["fine-tuning"] = finetuning_choices(config.finetuning(config.init, 0, config.finetune_lrs[0]))
    return choices


def _optimiser(config: PretrainConfig) -> str:
    decay = f"weight decay {config.weight_decay:g}" if config.weight_decay else "no weight decay"
    rise = f"a rise of {config.lr_rise} iterations" if config.lr_rise else ""
    fall = "a fall to 0 by a cosine" if config.schedule == "cosine" else ""
    told = " and ".join(words for words in (rise, fall) if words) or "no schedule of the rates"
    name = f"SGD, {_momentum(config.momentum)}" if config.optimiser == "sgd" else "AdamW, betas 0.9 and 0.999"
    more = [f"layer decay {config.layer_decay:g}"] if config.layer_decay != 1 else []
    more += [f"drop path {config.drop_path:g}"] if config.drop_path else []
    return ", ".join([name, decay, told, *more])


def _momentum(momentum: float) -> str:
    return f"momentum {momentum:g} without Nesterov" if momentum else "no momentum"


def _batch_norm(batches: int, when: str) -> str:
    return f"adapted once, {when}on {batches} batches of training views" if batches else "not adapted beforehand"

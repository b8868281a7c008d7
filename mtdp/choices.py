"""What the paper leaves open, and what is done here: written beside every result, so that a reader need not ask.

Nothing reads it back. What has an option of its own (image_px, adaptation_batches, ...) stands in the settings.
"""

from __future__ import annotations

from typing import Final

PRETRAINING_CHOICES: Final = {
    "optimiser": "SGD, momentum 0.9 without Nesterov, no weight decay, no schedule of the rates",
    "momentum after the warm-up": "starts anew",
    "rate of the heads in the warm-up": "warmup_lr itself; the multiplier tau is not applied",
    "heads without a sample in a batch": "left alone, and so is their momentum",
    "batch norm": "adapted once, before the warm-up, on training views; after it, statistics of the mixed batch",
    "splits of the pool's tasks": "train and val; train alone of tasks that joint training is judged on",
    "weights kept": "of the last iteration",
    "DenseNet": "without its last ReLU, in training and in its features",
}
FINETUNING_CHOICES: Final = {
    "optimiser": "SGD, momentum 0.9 without Nesterov, no weight decay, no schedule, one rate for backbone and head",
    "batch norm": "not adapted before fine-tuning, unless adaptation_batches says so",
    "augmentation": "as in pre-training: square crop and flips",
    "rate and epoch": "of the best score on val by the task's metric; the first of equals",
}
TRANSFER_CHOICES: Final = {
    "SVM": "liblinear, L2-regularised squared hinge loss, one against the rest, max_iter 1000",
    "features": "of the central square, not scaled",
    "C": "best mean score of the folds by the task's metric; the smallest of equals",
    "ranks": "within one network; equals share the mean of their ranks",
    "standard deviation": "of the sample (ddof 1); 0 for a single value",
    "combination of joint training": "of the best mean score on the task's own val, which is not trained on",
}
PROTOCOL_CHOICES: Final = {
    "pre-training": PRETRAINING_CHOICES,
    "fine-tuning": FINETUNING_CHOICES,
    "transfer": TRANSFER_CHOICES,
}

"""Batch-norm adaptation: new statistics, same function (paper: adaptation of batch normalisation before training).

A network trained on one domain carries that domain's batch-norm statistics. In train mode, on another domain, they are
replaced at once by those of the batch, and the features are no longer what was learnt. So beforehand each layer takes
the new domain's statistics, and its scale and shift absorb the difference: its output in eval mode stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle


@torch.no_grad()
def adapt_batch_norm(backbone: nn.Module, inputs: Iterable[torch.Tensor]) -> int:
    """Give each batch-norm layer the statistics of its own input over some batches, and compensate for it.

    The backbone runs in eval mode, so that no layer's change reaches the next. With s the old and t the new statistics
    (mean, and unbiased variance, averaged over batches):

        weight_t = weight_s * sqrt(var_t + eps) / sqrt(var_s + eps)
        bias_t   = bias_s + weight_s * (mean_t - mean_s) / sqrt(var_s + eps)

    Args:
        inputs: batches float32[B, 3, H, W] of the mixed tasks, as in training.

    Returns:
        The number of batches seen. The backbone is left in eval mode.
    """
    layers = [m for m in backbone.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None and m.affine]
    sums = {layer: (torch.zeros(layer.num_features), torch.zeros(layer.num_features)) for layer in layers}
    hooks: list[RemovableHandle] = [layer.register_forward_pre_hook(_collector(sums)) for layer in layers]
    backbone.eval()
    count = 0
    try:
        for batch in inputs:
            backbone(batch)
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
    if count == 0:
        return 0
    for layer in layers:
        mean_sum, var_sum = sums[layer]
        _absorb(layer, mean_sum / count, var_sum / count, count)
    return count


def _collector(sums: dict[_BatchNorm, tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., None]:
    def collect(layer: _BatchNorm, args: tuple[torch.Tensor]) -> None:
        x = args[0].float()
        dims = [0, *range(2, x.dim())]
        var, mean = torch.var_mean(x, dim=dims, correction=1)
        sums[layer][0].add_(mean.cpu())
        sums[layer][1].add_(var.cpu())

    return collect


def _absorb(layer: _BatchNorm, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
    running_mean, running_var = layer.running_mean, layer.running_var
    assert running_mean is not None
    assert running_var is not None
    mean, var = mean.to(running_mean.device), var.to(running_var.device)
    old_scale = layer.weight / torch.sqrt(running_var + layer.eps)
    layer.bias.add_(old_scale * (mean - running_mean))
    layer.weight.copy_(old_scale * torch.sqrt(var + layer.eps))
    running_mean.copy_(mean)
    running_var.copy_(var)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(count)

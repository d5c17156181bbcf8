"""Our kernels as `benchmarks.kernels` calls them; without a GPU, what has no reference of ours is torch's own."""

from functools import cache

import torch
from torch import Tensor

from benchmarks import kernel_peers as peers
from benchmarks.kernel_inputs import BF16, Inputs
from parallel.layout.rng import Dropout
from parallel.ops.kernels.cross_entropy import cross_entropy
from parallel.ops.kernels.norm import fuses
from parallel.tensor.residual import Addend, NormalizedDim, fused_norm


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if not fuses(x):
        return peers.torch_layer_norm(x, weight, bias)
    return fused_norm(x, None, weight, bias, _dim(x, is_rms=False))[1]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    if not fuses(x):
        return peers.torch_rms_norm(x, weight)
    return fused_norm(x, None, weight, None, _dim(x, is_rms=True))[1]


def add_layer_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, *, dropout: float = 0.0) -> Inputs:
    """Normalize x + dropout(y), with a mask that is a function of rows and columns."""
    drawn = Dropout(dropout, *_coordinates(*x.shape, x.device)) if dropout else None
    if not fuses(x):
        return peers.torch_add_layer_norm(x, y if drawn is None else drawn.of(y), weight, bias)
    total, normed = fused_norm(x, Addend(y, None, drawn), weight, bias, _dim(x, is_rms=False))
    return normed, total


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor) -> Inputs:
    if not fuses(x):
        return peers.torch_add_rms_norm(x, y, weight)
    total, normed = fused_norm(x, Addend(y), weight, None, _dim(x, is_rms=True))
    return normed, total


def loss_and_gradient(logits: Tensor, labels: Tensor) -> Inputs:
    """Return the sum of the losses, and its gradient by the logits in bf16, in their memory."""
    entries = range(logits.shape[-1])
    loss, gradient = cross_entropy(logits, labels, entries=entries, scale=1.0, dtype=BF16, exchange=None)
    assert gradient is not None
    return loss, gradient


def _dim(x: Tensor, *, is_rms: bool) -> NormalizedDim:
    return NormalizedDim(x.shape[-1], (), 1e-5, is_rms)


@cache
def _coordinates(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return a key, and the numbers of rows and columns."""
    return torch.tensor(7, device=device), torch.arange(rows, device=device), torch.arange(columns, device=device)

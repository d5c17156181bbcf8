"""Our kernels as `benchmarks.kernels` calls them; without a GPU, what has no reference of ours is torch's own."""

from functools import cache

import torch
from torch import Tensor

from benchmarks import kernel_peers as peers
from benchmarks.kernel_inputs import BF16, GROUP, Inputs
from benchmarks.workload import BETAS, EPS, WEIGHT_DECAY
from parallel.config import OptimizerConfig
from parallel.layout.rng import Dropout
from parallel.ops.fp8 import E4M3
from parallel.ops.kernels.accumulate import accumulate
from parallel.ops.kernels.adamw import can_be_fused, update_fused
from parallel.ops.kernels.cast import cast, cast_and_transpose
from parallel.ops.kernels.cross_entropy import VocabularyPart, cross_entropy, multiply_in_place
from parallel.ops.kernels.elements import Elements, Noise, Step
from parallel.ops.kernels.heads import heads_of
from parallel.ops.kernels.lookup import lookup
from parallel.ops.kernels.norm import fuses
from parallel.ops.kernels.table import is_fused
from parallel.tensor.residual import Addend, NormalizedDim, residual_norm

TABLE = 2**20  # numbers of the tables of noise


def update(gradient: Tensor, parameter: Tensor, *states: Tensor) -> Inputs:
    """Update once, as if it were the second time: torch counts an update before it makes it."""
    master, first, second = states
    if not can_be_fused(gradient, (master, first, second)):
        return peers.torch_update(gradient, parameter, *states)
    noise = None if first.dtype == master.dtype else Noise(_tables(master.device), 2048, (1, 2, 3, 4))
    elements = Elements(gradient, (master, first, second), parameter, 2, WEIGHT_DECAY, noise)
    factor, found_inf = _scalars(master.device, peers.FACTOR)
    update_fused([elements], Step(factor, found_inf, 1e-4), OptimizerConfig(eps=EPS, betas=BETAS))
    return parameter, *states


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if not fuses(x):
        return peers.torch_layer_norm(x, weight, bias)
    return residual_norm(x, None, None, (weight, bias), _dim(x, is_rms=False))[1]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    if not fuses(x):
        return peers.torch_rms_norm(x, weight)
    return residual_norm(x, None, None, (weight, None), _dim(x, is_rms=True))[1]


def add_layer_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, *, dropout: float = 0.0) -> Inputs:
    """Normalize x + dropout(y), with a mask that is a function of rows and columns."""
    drawn = Dropout(dropout, *_coordinates(*x.shape, x.device)) if dropout else None
    if not fuses(x):
        return peers.torch_add_layer_norm(x, y if drawn is None else drawn.of(y), weight, bias)
    total, normed = residual_norm(x, Addend(y), drawn, (weight, bias), _dim(x, is_rms=False))
    return normed, total


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor) -> Inputs:
    if not fuses(x):
        return peers.torch_add_rms_norm(x, y, weight)
    total, normed = residual_norm(x, Addend(y), None, (weight, None), _dim(x, is_rms=True))
    return normed, total


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> Inputs:
    if not is_fused("heads", qkv):
        return peers.torch_rotary(qkv, cos, sin)
    groups = qkv.shape[-1] // cos.shape[-1] // (GROUP + 2)
    return heads_of(qkv, GROUP * groups, groups, bias=None, tables=(cos, sin))


def heads(qkv: Tensor) -> Inputs:
    if not is_fused("heads", qkv):
        return peers.torch_heads(qkv)
    count = qkv.shape[-1] // 192
    return heads_of(qkv, count, count, bias=None, tables=None)


def to_fp32(gradient: Tensor) -> Tensor:
    """Return a gradient in the dtype of the sum over microbatches."""
    out = torch.empty_like(gradient, dtype=torch.float32)
    accumulate(gradient, out, is_first=True)
    return out


def loss_and_gradient(logits: Tensor, labels: Tensor) -> Inputs:
    """Return the sum of the losses, and its gradient by the logits in bf16, in their memory."""
    part = VocabularyPart(range(logits.shape[-1]))
    loss, gradient = cross_entropy(logits, labels, part, scale=1.0, dtype=BF16)
    assert gradient is not None
    return loss, gradient


def cast_flat(x: Tensor) -> Tensor:
    scale, amax = _scalars(x.device, peers.SCALE)
    return cast(x, scale, E4M3, amax)


def cast_both_ways(x: Tensor) -> Inputs:
    scale, amax = _scalars(x.device, peers.SCALE)
    found = cast_and_transpose(x, scale, E4M3, amax)
    return found.rows, found.columns


def lookup_of(table: Tensor, indices: Tensor) -> Tensor:
    return lookup(indices, table)


def multiply(x: Tensor) -> Tensor:
    return multiply_in_place(x, _scalars(x.device, peers.FACTOR)[0])


def _dim(x: Tensor, *, is_rms: bool) -> NormalizedDim:
    return NormalizedDim(x.shape[-1], (), 1e-5, is_rms)


@cache
def _coordinates(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return a key, and the numbers of rows and columns."""
    return torch.tensor(7, device=device), torch.arange(rows, device=device), torch.arange(columns, device=device)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a permutation, and numbers of 16 bits, each twice in a row."""
    order = torch.randperm(TABLE, device=device).to(torch.int32).repeat(2)
    return order, order % 2**16


@cache
def _scalars(device: torch.device, number: float) -> tuple[Tensor, Tensor]:
    """Return a number, and 0."""
    return torch.tensor(number, device=device), torch.zeros((), device=device)

"""The norm of a gradient that is divided over many ranks, and clipping by it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.chunk.chunk import Chunk
from parallel.chunk.gradient import squares_of
from parallel.mesh.collectives import all_reduce
from parallel.mesh.mesh import Axis
from parallel.storage.transfer import to_device


def global_norm(chunks: Sequence[Chunk], world: Axis) -> Tensor:
    """Return the 2-norm of the whole model's gradient, an fp64 scalar that is the same to the last bit on every rank.

    Each of the ranks that hold the same chunk counts one slice of it, so that every element counts once; padding is
    zero. An element that is not finite on any rank makes the norm not finite on every rank, even if that rank's slice
    is a copy and counts zero times: zero times infinity is NaN.
    """
    return norm_and_sum(chunks, world, torch.zeros((), dtype=torch.float64, device=chunks[0].memory.device))[0]


def norm_and_sum(chunks: Sequence[Chunk], world: Axis, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the global norm, and the sum over all ranks of fp64 numbers, a scalar or [n], by one collective."""
    squares = squares_of([chunk.gradient for chunk in chunks])
    is_counted = torch.tensor([chunk.spec.is_counted for chunk in chunks], dtype=squares.dtype)
    total = (squares * to_device(is_counted, squares.device)).sum()
    found = all_reduce(torch.cat([total.view(1), numbers.view(-1)]), world)
    return found[0].sqrt(), found[1:].view(numbers.shape)


def clip_coefficient(norm: Tensor, clip: float | None) -> Tensor:
    """Return min(1, clip / (norm + 1e-6)), as in torch.nn.utils.clip_grad_norm_, or 1 if `clip` is None or 0."""
    return (clip / (norm + 1e-6)).clamp(max=1.0) if clip else torch.ones_like(norm)

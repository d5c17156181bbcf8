"""The norm of a gradient that lies in pieces on many ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.chunk.chunk import Chunk
from parallel.mesh.collectives import all_reduce
from parallel.mesh.mesh import Axis


def global_norm(chunks: Sequence[Chunk], world: Axis) -> Tensor:
    """The 2-norm of the whole model's gradient, an fp64 scalar, the same to the last bit on every rank.

    Ranks that hold the same chunk take a slice of it each, so that every element counts once; padding is zero. What is
    not finite on any rank makes the norm so on every rank, although a copy counts zero times: zero times infinity is
    NaN.
    """
    total = torch.zeros((), dtype=torch.float64, device=chunks[0].memory.device)
    for chunk in chunks:
        total += chunk.gradient.squares() * chunk.spec.is_counted
    return all_reduce(total, world).sqrt()


def clip_coefficient(norm: Tensor, clip: float | None) -> Tensor:
    """min(1, clip / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it; 1 where `clip` is None or 0."""
    return (clip / (norm + 1e-6)).clamp(max=1.0) if clip else torch.ones_like(norm)

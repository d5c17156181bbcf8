"""The norm of a gradient that lies in pieces on many ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.collectives import all_reduce
from parallel.layout import Layout
from parallel.mesh import Axis


def global_norm(layouts: Sequence[Layout], gradients: Sequence[Tensor], world: Axis) -> Tensor:
    """The 2-norm of the whole model's gradient, an fp64 scalar, the same to the last bit on every rank.

    Each element counts once, on the rank that owns it; padding is zero. What is not finite on any rank, owner or not,
    makes the norm so on every rank: a replica counts zero times, and zero times infinity is NaN.
    """
    total = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    for layout, norm in zip(layouts, torch._foreach_norm(list(gradients)), strict=True):
        total += norm.double().square() * layout.owner
    return all_reduce(total, world).sqrt()


def clip_coefficient(norm: Tensor, clip: float | None) -> Tensor:
    """min(1, clip / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it; 1 where `clip` is None or 0."""
    return (clip / (norm + 1e-6)).clamp(max=1.0) if clip else torch.ones_like(norm)

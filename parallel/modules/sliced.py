"""The slice that a rank keeps of a parameter between the moment its values are known and the moment it is laid into a
flat chunk.

The parameter itself stays what a user knows: the same object, its full shape, requires_grad. So an optimizer can be
made of it, it can be frozen, tied or counted; only its values are elsewhere. Whoever computes with it gets NaN.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.chunk.parameters import placeholder
from parallel.mesh.collectives import MAX, all_gather, all_reduce
from parallel.mesh.mesh import Axis

ATTRIBUTE = "_slice_of_this_rank"  # on the parameter, so that it goes wherever the parameter goes


@dataclass(frozen=True, eq=False)
class Slice:
    """part[N_axis]: this rank's share of a tensor of N elements, taken flat and filled up with zeros at the end."""

    part: Tensor
    axis: Axis

    @classmethod
    def of(cls, x: Tensor, axis: Axis) -> "Slice":
        """A copy of this rank's share of x[...], which every rank holds whole."""
        size = math.ceil(x.numel() / axis.size)
        part, mine = x.new_zeros(size), x.detach().flatten()[axis.rank * size : (axis.rank + 1) * size]
        part[: len(mine)] = mine
        return cls(part, axis)

    def gather(self, out: Tensor) -> Tensor:
        """The whole tensor, in `out`, whatever its dtype and strides. A collective: every rank of the axis calls it."""
        return out.copy_(all_gather(self.part, 0, self.axis)[: out.numel()].view(out.shape))


def divide(parameter: nn.Parameter, axis: Axis) -> None:
    """From here on this rank holds its slice of the parameter, and a stand-in for the rest."""
    assert not is_divided(parameter)
    setattr(parameter, ATTRIBUTE, Slice.of(parameter, axis))
    parameter.data = placeholder(tuple(parameter.shape), parameter.dtype, parameter.device)


def is_divided(parameter: Tensor) -> bool:
    return hasattr(parameter, ATTRIBUTE)


def restore(parameter: nn.Parameter, out: Tensor) -> None:
    """Gather the parameter's values into `out`, of its shape, and let the slice go. Its data stays a stand-in.

    A collective: every rank of the axis restores the same parameters in the same order. What became of the stand-in
    meanwhile (a cast, a move to another device) is of no account.
    """
    held: Slice = getattr(parameter, ATTRIBUTE)
    held.gather(out)
    delattr(parameter, ATTRIBUTE)


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two divided parameters hold the same on every rank: torch.equal, and a collective."""
    a, b = (getattr(x, ATTRIBUTE) for x in (one, other))
    differ = torch.tensor(float(one.shape != other.shape or not torch.equal(a.part, b.part)), device=a.part.device)
    return not all_reduce(differ, a.axis, MAX)

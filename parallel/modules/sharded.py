"""The shard that a rank keeps of a parameter from the time its values are known until a chunk takes them over.

The parameter itself stays the same object, with its full shape and `requires_grad`. So an optimizer can be made of it,
and it can be frozen, tied or counted; only its values are elsewhere. Code that computes with it gets NaN. (FSDP2 puts a
DTensor in the parameter's place instead.)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallel.chunk.parameters import placeholder
from parallel.mesh.collectives import MAX, all_gather, all_reduce
from parallel.mesh.mesh import Axis

ATTRIBUTE = "_shard_of_this_rank"  # on the parameter, so that it goes wherever the parameter goes


@dataclass(frozen=True, eq=False)
class Shard:
    """part[N_axis]: this rank's share of a flattened tensor of N elements, which is padded with zeros at the end."""

    part: Tensor
    axis: Axis

    @classmethod
    def of(cls, x: Tensor, axis: Axis) -> "Shard":
        """Return a copy of this rank's share of x[...], which every rank holds whole."""
        size = math.ceil(x.numel() / axis.size)
        part, mine = x.new_zeros(size), x.detach().flatten()[axis.rank * size : (axis.rank + 1) * size]
        part[: len(mine)] = mine
        return cls(part, axis)

    def gather(self, out: Tensor) -> Tensor:
        """All-gather the whole tensor into `out`, of any dtype and strides; every rank of the axis calls this."""
        return out.copy_(all_gather(self.part, 0, self.axis)[: out.numel()].view(out.shape))


def shard_parameter(parameter: nn.Parameter, axis: Axis) -> None:
    """Keep this rank's shard of a parameter that every rank holds whole, and put a placeholder in its place."""
    assert not is_sharded(parameter)
    setattr(parameter, ATTRIBUTE, Shard.of(parameter, axis))
    parameter.data = placeholder(tuple(parameter.shape), parameter.dtype, parameter.device)


def is_sharded(parameter: Tensor) -> bool:
    """Return whether the parameter's values are shards on the ranks."""
    return hasattr(parameter, ATTRIBUTE)


def unshard_parameter(parameter: nn.Parameter, out: Tensor) -> None:
    """All-gather the parameter's values into `out`, of its shape, and drop the shard.

    Every rank of the axis does so for the same parameters in the same order. The parameter's data stays a placeholder,
    and it does not matter what became of that meanwhile (a cast, a move to another device).
    """
    shard: Shard = getattr(parameter, ATTRIBUTE)
    shard.gather(out)
    delattr(parameter, ATTRIBUTE)


def sharded_equal(one: Tensor, other: Tensor) -> bool:
    """Return torch.equal of two sharded parameters, the same on every rank; every rank of the axis calls this."""
    a, b = (getattr(x, ATTRIBUTE) for x in (one, other))
    differ = torch.tensor(float(one.shape != other.shape or not torch.equal(a.part, b.part)), device=a.part.device)
    return not all_reduce(differ, a.axis, MAX)

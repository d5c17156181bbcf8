"""The weights of a chunk in 8 bits, which ZeRO stage 3 gathers in the place of the parameters: half of the bytes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from parallel.chunk.spec import ChunkSpec
from parallel.mesh.collectives import Pending, start_all_gather
from parallel.ops.fp8 import E4M3
from parallel.ops.kernels.cast import cast
from parallel.tensor.scaling import LinearScales


class EightBitWeights:
    """The weights of a chunk, all of which are those of linears that multiply in 8 bits.

    own [n_shard]  this rank's slice in E4M3, cast from its slice of the parameters when it is needed first in a step
    whole [n]      the slices of all ranks, from `gather` to `release`; None at other times

    Each weight has its own scale, that of the whole tensor: the whole buffer is to the bit what a cast of the gathered
    parameters would be. `scales` are those of the linears of the chunk's parameters, in order.
    """

    def __init__(self, spec: ChunkSpec, scales: Sequence[LinearScales]) -> None:
        self.spec, self.state = spec, scales[0].state
        self.scales = {info: of_linear.weight for info, of_linear in zip(spec.infos, scales, strict=True)}
        self.own: Tensor | None = None
        self.whole: Tensor | None = None

    @property
    def is_on(self) -> bool:
        """True in the steps of a training, once there are scales. (Elsewhere somebody may want the parameters.)"""
        state = self.state
        return state.is_known and state.records

    def gather(self, parameters: Tensor) -> Pending:
        """Start to make the weights whole, of this rank's slice of the parameters, [n_shard] on the device."""
        if self.own is None:
            self.own = self._cast(parameters)
        self.whole = self.own.new_empty(self.spec.size)
        axis = self.spec.shard_axis
        return start_all_gather(self.own.view(torch.uint8), 0, axis, out=self.whole.view(torch.uint8))

    def release(self) -> None:
        """Free the memory of the whole weights."""
        self.whole = None

    def clear(self) -> None:
        """Drop this rank's slice: the parameters or the scales may have changed."""
        self.own = None

    def view(self, number: int) -> Tensor | None:
        """Return the weight with this number in E4M3, in the parameter's local shape; None while it is not whole."""
        start, shape = self.spec.starts[number], self.spec.shapes[number]
        return None if self.whole is None else self.whole[start : start + shape.numel()].view(shape)

    def _cast(self, parameters: Tensor) -> Tensor:
        """Return a slice of the parameters in E4M3, and record the largest magnitude of each weight in it."""
        own = torch.zeros_like(parameters, dtype=E4M3)
        for segment, target in zip(self.spec.segments(parameters), self.spec.segments(own), strict=True):
            scale = self.scales[segment.info]
            target.data.copy_(cast(segment.data, scale.scale, E4M3, scale.amax))
        return own

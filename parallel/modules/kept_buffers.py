"""The buffers of a module as they were before a step, for a step that is left out."""

import torch
from torch import Tensor, nn


class KeptBuffers:
    """Keeps a copy of each floating-point buffer from before the first forward of a step on.

    A forward with a number that is not finite leaves it in BatchNorm's running statistics: then a step that updates
    nothing would still spoil the model. All are copied, since versions do not show what BatchNorm writes. `is_on`: else
    none is.
    """

    def __init__(self, module: nn.Module, *, is_on: bool) -> None:
        self._module, self._is_on = module, is_on
        self._kept: list[tuple[Tensor, Tensor]] = []  # each buffer and its copy, within a step

    def begin(self) -> None:
        """Copy the buffers, at the first forward of a step."""
        if self._is_on and not self._kept:
            floating = [x for x in self._module.buffers() if x.is_floating_point()]
            self._kept = [(x, x.detach().clone()) for x in floating]

    @torch.no_grad()
    def end(self, *, is_left_out: bool) -> None:
        """End a step. Where it is left out, buffers that have become NaN in it get the values that they had before."""
        for buffer, copy in self._kept if is_left_out else ():
            if buffer.isnan().any():
                buffer.copy_(copy)
        self._kept = []

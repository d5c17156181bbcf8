"""A rank's part of a model: some of its layers, in order, and what the outside must know about them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from parallel.layout import ParameterInfo
from parallel.pipeline.microbatch import Limits, Microbatch


class Stage(nn.Module):
    """One pipeline stage of a model.

    forward(x, microbatch): x is None on the first stage, elsewhere the previous stage's output; the last returns the
    loss summed over this rank's tokens, the others activations of `boundary(B, S)`'s shape.

    `infos` are the parameters of this rank, each once. `speaks`: whether this rank, among those that compute the same
    loss, is the one that counts.
    `limits`: what the model can be given.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        infos: Sequence[ParameterInfo],
        *,
        boundary: Callable[[int, int], tuple[int, ...]],
        dtype: torch.dtype,
        speaks: bool,
        limits: Limits,
    ) -> None:
        super().__init__()
        self.layers, self.infos = nn.ModuleList(layers), list(infos)
        self.boundary, self.dtype, self.speaks, self.limits = boundary, dtype, speaks, limits

    def forward(self, x: Tensor | None, microbatch: Microbatch) -> Tensor:
        for layer in self.layers:
            x = layer(x, microbatch)
        assert x is not None
        return x

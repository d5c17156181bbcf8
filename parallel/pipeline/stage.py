"""A rank's part of a model: some of its layers, in order, and what the outside must know about them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from parallel.activations.offload import InputsOnHost
from parallel.layout.layout import ParameterInfo
from parallel.pipeline.microbatch import Limits, Microbatch


class Stage(nn.Module):
    """One pipeline stage of a model.

    forward(x, microbatch): x is None on the first stage, elsewhere the previous stage's output; the last returns the
    loss summed over this rank's tokens, the others activations of `boundary(B, S)`'s shape.

    `infos` are the parameters of this rank, each once. `is_counted`: whether this rank's loss is the one that counts,
    among the ranks that compute the same loss.
    `limits`: what the model can be given.

    `units`: the layers, by the unit of their parameters, that can be made whole one at a time, when they compute.
    `fill`: gives parameters that came without a storage their first values.
    `inputs`: where layers are recomputed and their inputs kept on the host.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        infos: Sequence[ParameterInfo],
        *,
        boundary: Callable[[int, int], tuple[int, ...]],
        dtype: torch.dtype,
        is_counted: bool,
        limits: Limits,
    ) -> None:
        super().__init__()
        self.units: Mapping[str, nn.Module] = {}
        self.fill: Callable[[Sequence[ParameterInfo]], None] = lambda infos: None
        self.inputs: InputsOnHost | None = None
        self.layers, self.infos = nn.ModuleList(layers), list(infos)
        self.boundary, self.dtype, self.is_counted, self.limits = boundary, dtype, is_counted, limits

    def forward(self, x: Tensor | None, microbatch: Microbatch) -> Tensor:
        for layer in self.layers:
            x = layer(x, microbatch)
        assert x is not None
        return x

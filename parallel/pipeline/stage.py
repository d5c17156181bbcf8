"""A rank's part of a model: some of its layers, in order, and what the outside must know about them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.layout import ParameterInfo
from parallel.memory.inputs import InputsOnHost
from parallel.pipeline.microbatch import Limits, Microbatch
from parallel.recomputation import recomputation


class Recomputed(nn.Module):
    """A layer of which only the input is kept for backward, which runs the forward again (Chen et al. 2016, section 3),
    as far as it goes to what was not kept: not to the last product, nor to its collectives.

    No random stream needs restoring: dropout has no state. `inputs`: keeps the input, on the host.
    """

    def __init__(self, layer: nn.Module, inputs: InputsOnHost | None = None) -> None:
        super().__init__()
        self.layer = layer
        kept = partial(checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts)
        self._checkpoint = kept if inputs is None else inputs.around(kept)

    def forward(self, x: Tensor, microbatch: Microbatch) -> Tensor:
        y: Tensor = self._checkpoint(self.layer, x, microbatch)
        return y


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around a forward, and around its second run."""
    return nullcontext(), recomputation()


class Stage(nn.Module):
    """One pipeline stage of a model.

    forward(x, microbatch): x is None on the first stage, elsewhere the previous stage's output; the last returns the
    loss summed over this rank's tokens, the others activations of `boundary(B, S)`'s shape.

    `infos` are the parameters of this rank, each once. `speaks`: whether this rank, among those that compute the same
    loss, is the one that counts.
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
        speaks: bool,
        limits: Limits,
    ) -> None:
        super().__init__()
        self.units: Mapping[str, nn.Module] = {}
        self.fill: Callable[[Sequence[ParameterInfo]], None] = lambda infos: None
        self.inputs: InputsOnHost | None = None
        self.layers, self.infos = nn.ModuleList(layers), list(infos)
        self.boundary, self.dtype, self.speaks, self.limits = boundary, dtype, speaks, limits

    def forward(self, x: Tensor | None, microbatch: Microbatch) -> Tensor:
        for layer in self.layers:
            x = layer(x, microbatch)
        assert x is not None
        return x

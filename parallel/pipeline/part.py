"""One rank's part of a model: its pipeline stages, and what the pipeline and the engine must know of them."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from torch import Tensor, nn

from parallel.activations.offload import InputsOnHost
from parallel.layout.layout import ParameterInfo
from parallel.pipeline.microbatch import Limits, Microbatch

SetValues: TypeAlias = Callable[[Sequence[ParameterInfo]], None]
"""A function that gives each of these parameters its first value."""


@dataclass(frozen=True)
class StageInterface:
    """The form of what a stage takes and returns.

    `activation_shape`: (B, S) of a microbatch -> the shape of the activations between stages, as each rank holds them.
    `dtype`: the dtype of these activations.
    `is_counted`: whether this rank's loss enters the sum over ranks. Of the ranks that compute the same loss one is
    counted.
    `limits`: the token ids and lengths that the model can be given.
    """

    activation_shape: Callable[[int, int], tuple[int, ...]]
    dtype: torch.dtype
    is_counted: bool
    limits: Limits


def keep_values(infos: Sequence[ParameterInfo]) -> None:
    """Leave the parameters as they are."""


class ModelPart(nn.Module):
    """The pipeline stages of a model that one rank holds: one or, with several chunks, some that are far apart.

    forward(x, microbatch, stage): x is None on the first stage of the model and the previous stage's output on the
    others. The last stage returns the loss summed over this rank's tokens, the others return activations.

    `stages`: the layers of each of this rank's stages, in order, by the stage's number in the model.
    `infos`: the parameters of this rank, each once.
    `units`: the layers whose parameters can be gathered on demand, one layer at a time, by the name of their unit
    (`ParameterInfo.unit`).
    `set_initial_values`: called with the parameters that were built without a storage, once they have one.
    `inputs`: the host storage of the layers' inputs, where layers are recomputed and their inputs offloaded.
    """

    def __init__(
        self,
        stages: Mapping[int, Sequence[nn.Module]],
        infos: Sequence[ParameterInfo],
        *,
        interface: StageInterface,
        units: Mapping[str, nn.Module],
        set_initial_values: SetValues = keep_values,
        inputs: InputsOnHost | None = None,
    ) -> None:
        super().__init__()
        self.stages = {number: tuple(layers) for number, layers in stages.items()}
        self.layers, self.infos = nn.ModuleList(layer for layers in stages.values() for layer in layers), list(infos)
        self.interface, self.units = interface, units
        self.set_initial_values, self.inputs = set_initial_values, inputs

    def layer_names(self) -> dict[nn.Module, str]:
        """Return the name of each layer: that of its unit, or the one that its first parameter has."""
        unit_of = {info.parameter: info.unit for info in self.infos}
        found = {layer: next((unit_of[x] for x in layer.parameters() if x in unit_of), "") for layer in self.layers}
        return {layer: name for layer, name in found.items() if name}

    def last_units(self) -> list[str]:
        """Return the name of the last unit of each stage that has one."""
        stages = [[name for name, layer in self.units.items() if layer in layers] for layers in self.stages.values()]
        return [names[-1] for names in stages if names]

    def num_gradients(self) -> Mapping[nn.Parameter, int]:
        """Return how many gradients each parameter gets of a microbatch: one from each of this rank's layers that have
        it. A tied table may be in the first layer and the last.
        """
        return Counter(x for layer in self.layers for x in layer.parameters())

    def train(self, mode: bool = True) -> Self:
        """Do what torch's `train` does, in a tenth of its time where every module is in this mode already."""
        waiting: list[nn.Module | None] = [self]
        while waiting:
            module = waiting.pop()
            if module is not None and module.training is not mode:
                return super().train(mode)
            waiting += [] if module is None else module._modules.values()
        return self

    def forward(self, x: Tensor | None, microbatch: Microbatch, stage: int) -> Tensor:
        if self.inputs is not None:
            self.inputs.begin_pass()
        for layer in self.stages[stage]:
            x = layer(x, microbatch)
        assert x is not None
        return x

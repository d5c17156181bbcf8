"""The chunks of an engine of any module, and what the config changes in the module."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from parallel.activations.offload import InputsOnHost
from parallel.chunk.chunk import Chunk, make_chunks
from parallel.engine.composition import initial_placement_of
from parallel.engine.context import Context
from parallel.layout.layout import ParameterInfo
from parallel.modules.buffers import broadcast_buffers
from parallel.modules.parameters import broadcast_parameters, make_gradients_dense
from parallel.modules.recompute import recompute_layers
from parallel.modules.sharded import expose_placeholders
from parallel.placement.initial import InitialPlacement
from parallel.placement.shortage import refusing_without_room


def chunks_of_module(
    infos: Sequence[ParameterInfo], context: Context, *, is_torchs: bool
) -> tuple[list[Chunk], InitialPlacement]:
    """Return the chunks of these parameters, with rank 0's values, and their placement before the first step.

    `is_torchs`: with an optimizer of torch's.
    """
    # A step has as many microbatches as the user likes: 2 stands for any number above 1.
    placement = initial_placement_of(infos, context, num_microbatches=2, is_torchs=is_torchs)
    expose_placeholders(info.parameter for info in infos)
    with refusing_without_room(context.place.rank, "making the model"), placement.explain_host_shortage():
        chunks = make_chunks(
            placement.specs,
            placement.storages,
            fill=partial(broadcast_parameters, axis=context.mesh.axis("data")),
            device=context.device,
        )
    return chunks, placement


def prepare(module: nn.Module, layers: Mapping[str, nn.Module], context: Context) -> InputsOnHost | None:
    """Change the module as the config says: its buffers, and how its layers compute.

    Returns the inputs of its recomputed layers, where those are kept on the host.
    """
    train = context.config.train
    make_gradients_dense(module)
    broadcast_buffers(module, context.device, context.dtype, context.mesh.axis("data"))
    if train.compile:
        for layer in layers.values():
            layer.forward = torch.compile(layer.forward)
    inputs = InputsOnHost(context.device) if train.activation_checkpointing == "offload" else None
    if train.activation_checkpointing != "none":
        recompute_layers(module, layers, inputs, compiles=train.compile)
    return inputs

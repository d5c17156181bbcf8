"""The parts that an engine is composed of: where its chunks are placed first, and which optimizer updates them."""

from collections.abc import Sequence
from typing import TypeAlias

import torch

from parallel.chunk.chunk import Chunk
from parallel.chunk.spec import specs_of
from parallel.config import Config
from parallel.engine.context import Context
from parallel.errors import ConfigError
from parallel.layout.layout import ParameterInfo
from parallel.optim.adamw import AdamW
from parallel.optim.torch_optimizer import TorchOptimizer
from parallel.placement.chunk_bytes import foreseen_bytes
from parallel.placement.initial import InitialPlacement, initial_placement

Optimizer: TypeAlias = AdamW | TorchOptimizer


def initial_placement_of(
    infos: Sequence[ParameterInfo], context: Context, *, num_microbatches: int = 0, is_torchs: bool = False
) -> InitialPlacement:
    """Return the placement of the chunks of these parameters before the first step, before the chunks are made.

    `num_microbatches` is that of a step; 0: the config's. `is_torchs`: with an optimizer of torch's. Every rank calls
    this. Raises ConfigError, on every rank, where one has too little room.
    """
    config, place = context.config, context.place
    num_microbatches = num_microbatches or config.num_microbatches(place.world_size) or 2
    specs = specs_of(infos, context.dtype, zero=config.zero.stage)
    sizes = [foreseen_bytes(spec, num_microbatches, config.optimizer, is_torchs=is_torchs) for spec in specs]
    return initial_placement(
        specs,
        sizes,
        config,
        world=context.mesh.world,
        num_ranks_on_host=place.local_world_size,
        device=context.mesh.device,
    )


def optimizer_of(chunks: Sequence[Chunk], config: Config, passed: torch.optim.Optimizer | None) -> Optimizer:
    """Return the optimizer of the chunks: the one that was passed, sharded as they are, or else the config's AdamW.

    Raises ConfigError or ModelError for one that cannot be sharded.
    """
    if passed is None:
        return AdamW(chunks, config.optimizer)
    if config.optimizer.state_dtype != "fp32":
        raise ConfigError(
            f"optimizer.state_dtype: {config.optimizer.state_dtype!r} is for the config's own AdamW; an optimizer that"
            " is passed has states of its own dtype. Try 'fp32', or pass no optimizer."
        )
    return TorchOptimizer(chunks, passed)

"""What a config comes to in a world of some size: each stage's layers, its bytes and its pace, with nothing started."""

from dataclasses import dataclass

import torch

from models import opt
from models.build import costs_of, outline, split
from models.shapes import OPTShape, parameter_count, shape_of
from parallel.chunk.precision import gradient_dtype, master_dtype, state_size
from parallel.config import Config
from parallel.engine.context import Place, make_context
from parallel.layout.layout import ParameterInfo
from parallel.mesh.topology import Topology
from parallel.pipeline.schedule import SCHEDULES, with_transfers
from parallel.pipeline.timeline import Timeline, simulate
from parallel.tensor import MODES


@dataclass(frozen=True)
class StagePreview:
    """A pipeline stage as each of its ranks holds it: they are all alike, padding included.

    Bytes are of what lasts: weights, gradients at the end of a step, and the optimizer's masters and moments. `cost` is
    the stage's `layer_costs`, over all of its ranks.
    """

    layers: tuple[str, ...]
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    cost: float

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class Preview:
    """A config laid out over a world."""

    config: Config
    topology: Topology
    stages: tuple[StagePreview, ...]

    @property
    def shape(self) -> OPTShape:
        return shape_of(self.config)

    @property
    def parameters(self) -> int:
        """Of the whole model, the tied embedding once, padding not at all."""
        return parameter_count(self.shape)

    @property
    def num_microbatches(self) -> int:
        return self.config.num_microbatches(self.topology.world_size)

    def timeline(self) -> Timeline:
        """One step of the pipeline, by the layers' costs: a backward costs two forwards, a transfer nothing."""
        pipeline = self.config.parallel.pipeline
        plan = with_transfers(SCHEDULES[pipeline.schedule](pipeline.size, self.num_microbatches))
        costs = [stage.cost for stage in self.stages]
        return simulate(plan, costs, [2 * cost for cost in costs])


def preview(config: Config, world_size: int) -> Preview:
    """Lay a resolved config out over `world_size` ranks."""
    topology = Topology(config.parallel.mesh_shape(world_size))
    return Preview(config, topology, tuple(_stage(config, topology, s) for s in range(config.parallel.pipeline.size)))


def _stage(config: Config, topology: Topology, stage: int) -> StagePreview:
    rank = topology.rank_of({axis: stage if axis == "pipe" else 0 for axis in topology.shape})
    context = make_context(config, Place(rank, topology.world_size), connect=False, device=torch.device("meta"))
    mode = MODES[config.parallel.tensor.mode](context.mesh, context.dtype)
    specs, costs = opt.layers_of(shape_of(config), mode, config.train.seed), costs_of(config)
    own = split(costs, config.parallel.pipeline)[stage]
    infos, microbatches = outline(context).infos, config.num_microbatches(topology.world_size)
    parameters = sum(info.parameter.numel() for info in infos)
    master = master_dtype(context.dtype)

    def of_a_rank(info: ParameterInfo, *, from_stage: int) -> int:
        """Elements on each rank of what ZeRO divides from this stage on."""
        ranks = info.layout.sync[0].size if config.zero.stage >= from_stage else 1
        return -(-info.parameter.numel() // ranks)

    # A weight that is wide enough is its own master.
    state = state_size(master, config.optimizer) - (master.itemsize if master == context.dtype else 0)
    return StagePreview(
        tuple(specs[i].name for i in own),
        parameters,
        weight_bytes=sum(context.dtype.itemsize * of_a_rank(info, from_stage=3) for info in infos),
        gradient_bytes=sum(
            gradient_dtype(context.dtype, info.layout.sync, microbatches).itemsize * of_a_rank(info, from_stage=2)
            for info in infos
        ),
        optimizer_bytes=sum(state * of_a_rank(info, from_stage=1) for info in infos),
        cost=sum(costs[i] for i in own),
    )

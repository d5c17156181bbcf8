"""A run laid out over a number of ranks: the layers, bytes and cost of each pipeline stage, with nothing started."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from models.build import costs_of, layers_of_stages, mode_of, part_of, specs_of_part
from models.costs import compute_costs, parameter_count
from models.kept import kept_bytes, kept_for_weights
from models.shape import ModelShape
from models.shapes import shape_of
from parallel.chunk.precision import gradient_dtype, master_dtype, state_size
from parallel.chunk.spec import specs_of
from parallel.config import Config
from parallel.engine.context import Place, make_context, topology_of
from parallel.engine.device import device_type
from parallel.engine.scales import eight_bit_linears
from parallel.layout.layout import ParameterInfo
from parallel.mesh.topology import Topology
from parallel.pipeline.part import ModelPart
from parallel.pipeline.schedule import plan_of
from parallel.placement.chunk_bytes import foreseen_bytes
from parallel.placement.save_room import foreseen_save_room, tightest
from parallel.plan.plan import Plan
from parallel.plan.timeline import Costs, Timeline, num_simulated, simulate


@dataclass(frozen=True)
class PartPreview:
    """The part of the model that each rank at one place of the pipe holds: equally much, padding included.

    `stages`: the names of its layers by the number of their stage. The bytes are those that last between steps:
    weights, gradients at the end of a step, and the optimizer's master weights and moments. As weights are counted
    their copies in 8 bits, too, which last for a step.
    """

    stages: Mapping[int, tuple[str, ...]]
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True)
class Preview:
    """A config laid out over a world: `parts` by the place in the pipe, and numbers of each of the pipeline's stages.

    `costs` are those of a stage's computes, for all of its ranks together. `kept_bytes` are the bytes that each of its
    ranks keeps of a microbatch between forward and backward, and `weight_bytes` those that it keeps from I to W.
    """

    config: Config
    topology: Topology
    parts: tuple[PartPreview, ...]
    costs: Costs
    kept_bytes: tuple[int, ...]
    weight_bytes: tuple[int, ...]

    @property
    def shape(self) -> ModelShape:
        return shape_of(self.config)

    @property
    def parameters(self) -> int:
        """The parameters of the whole model, the tied embedding once, without padding."""
        return parameter_count(self.shape)

    @property
    def num_microbatches(self) -> int:
        return self.config.num_microbatches(self.topology.world_size)

    @property
    def recomputes(self) -> bool:
        """True where blocks are computed again in backward."""
        return self.config.train.activation_checkpointing != "none"

    def plan(self, num_microbatches: int, *, joins: bool | None = None) -> Plan:
        """Return the plan of a step with this many microbatches, as the ranks execute it.

        `joins`: whether weight gradients are computed in the backward itself; None: as the run does it.
        """
        recomputes = self.recomputes if joins is None else joins
        return plan_of(self.config.parallel.pipeline, num_microbatches, recomputes=recomputes)

    def timeline(self, *, whole: bool = False, joins: bool | None = None) -> Timeline:
        """Simulate one step of the pipeline by the layers' costs; a transfer costs nothing. `joins` is that of `plan`.

        Of a step with very many microbatches the first and the last are simulated, unless it is asked for as a
        `whole`: see `Timeline`.
        """
        pipeline, total = self.config.parallel.pipeline, self.num_microbatches
        is_whole = whole or pipeline.file is not None
        simulated = total if is_whole else num_simulated(pipeline.num_stages, total)
        timeline = simulate(self.plan(simulated, joins=joins), self.costs)
        return replace(timeline, num_omitted=total - simulated)

    def peak_bytes(self, timeline: Timeline) -> tuple[int, ...]:
        """Return the most bytes that each rank keeps of microbatches in flight, and of a block that is recomputed."""
        train = replace(self.config.train, activation_checkpointing="none")
        block = kept_bytes(self.shape, replace(self.config, train=train))[1] if self.recomputes else 0
        return tuple(peak + block for peak in timeline.peak_kept(self.kept_bytes, self.weight_bytes))


def preview_of(config: Config, world_size: int) -> Preview:
    """Return a config, with every field set, laid out over `world_size` ranks."""
    topology = topology_of(config, world_size)
    parts = [_part_of_rank(config, Place(rank, world_size)) for rank in topology.first_pipe]
    stages = layers_of_stages(costs_of(config), config.parallel.pipeline)
    kept, for_weights = (each(shape_of(config), config) for each in (kept_bytes, kept_for_weights))
    return Preview(
        config,
        topology,
        tuple(parts),
        costs=_costs_of_stages(config, stages),
        kept_bytes=tuple(sum(kept[i] for i in layers) for layers in stages),
        weight_bytes=tuple(sum(for_weights[i] for i in layers) for layers in stages),
    )


def _costs_of_stages(config: Config, stages: Sequence[range]) -> Costs:
    """Return what the computes of each stage cost."""
    layers = compute_costs(
        shape_of(config),
        config.data.sequence_length,
        device_type(config.train.device),
        recomputes=config.train.activation_checkpointing != "none",
    )
    return Costs(
        forward=[sum(layers[i].forward for i in stage) for stage in stages],
        input_gradient=[sum(layers[i].input_gradient for i in stage) for stage in stages],
        weight_gradient=[sum(layers[i].weight_gradient for i in stage) for stage in stages],
    )


def device_messages(config: Config) -> list[str]:
    """Return a message if this machine cuts the pipeline into other stages than a machine with GPUs would."""
    pipeline = config.parallel.pipeline
    if config.train.device != "auto" or pipeline.size == 1 or pipeline.layers is not None:
        return []
    if device_type("auto") == "cuda":
        return []
    return ["the pipeline is split for CPUs: train.device=cuda shows how it is split for GPUs"]


def save_messages(config: Config, place: Place) -> list[str]:
    """Return how checkpoints would be saved if this were the ranks' host, or nothing where none is saved in the
    background. `place` is the world that is looked at: its ranks share the host if they are not known to be of several.
    """
    if not saves_in_background(config):
        return []
    device, rooms = torch.device(device_type(config.train.device)), []
    for rank in topology_of(config, place.world_size).first_pipe:
        context = make_context(config, Place(rank, place.world_size), connect=False, device=torch.device("meta"))
        specs = specs_of(part_of(context).infos, context.dtype, zero=config.zero.stage)
        microbatches = config.num_microbatches(place.world_size)
        sizes = [foreseen_bytes(spec, microbatches, config.optimizer) for spec in specs]
        num_ranks = place.local_world_size
        rooms.append(foreseen_save_room(specs, sizes, config.zero, num_ranks=num_ranks, device=device))
    return [tightest(rooms).describe()]


def saves_in_background(config: Config) -> bool:
    """Return whether a run saves checkpoints beside its steps."""
    output = config.output
    return output.checkpoint_async and bool(output.checkpoint_every or output.keep_best)


def _part_of_rank(config: Config, place: Place) -> PartPreview:
    """Return the part of a rank, built on the device "meta", where parameters have sizes and no data."""
    context = make_context(config, place, connect=False, device=torch.device("meta"))
    part = part_of(context)
    infos, zero = part.infos, config.zero.stage
    microbatches, dtype, master = config.num_microbatches(place.world_size), context.dtype, master_dtype(context.dtype)
    # A weight that is wide enough is its own master weight.
    state = state_size(master, config.optimizer) - (master.itemsize if master == dtype else 0)
    return PartPreview(
        {
            stage: tuple(spec.name for spec in specs)
            for stage, specs in specs_of_part(context, mode_of(context)).items()
        },
        sum(info.parameter.numel() for info in infos),
        weight_bytes=sum(dtype.itemsize * _elements_on_rank(info, divided=zero >= 3) for info in infos)
        + _bytes_in_8_bits(part, config, dtype),
        gradient_bytes=sum(
            gradient_dtype(dtype, info.layout.sync, microbatches).itemsize * _elements_on_rank(info, divided=zero >= 2)
            for info in infos
        ),
        optimizer_bytes=sum(state * _elements_on_rank(info, divided=zero >= 1) for info in infos),
    )


def _bytes_in_8_bits(part: ModelPart, config: Config, dtype: torch.dtype) -> int:
    """Return the bytes of the copies of weights in 8 bits: by rows and by columns or, where parameters are divided, of
    a rank's slices of the chunks that are gathered so. Weights that are cast when they are used have none that last.
    """
    weights, found = eight_bit_linears(part, config.train), 0
    if config.zero.tensor_placement_policy != "cuda":
        return 0
    for spec in specs_of(part.infos, dtype, zero=config.zero.stage):
        large = [info for info in spec.infos if info.parameter in weights]
        if not spec.is_partitioned:
            found += 2 * sum(_elements_on_rank(info, divided=False) for info in large)
        elif len(large) == len(spec.infos):
            found += sum(_elements_on_rank(info, divided=True) for info in large)
    return found


def _elements_on_rank(info: ParameterInfo, *, divided: bool) -> int:
    """Return the elements of a parameter on each rank: all of them, or a share where ZeRO divides them."""
    ranks = info.layout.sync[0].size if divided else 1
    return -(-info.parameter.numel() // ranks)

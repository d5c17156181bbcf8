"""Build the part that this rank holds of the model that a config names.

`part_of` does it step by step: it chooses the tensor mode and this rank's layers, builds these, ties the embeddings,
lets the blocks be compiled and recomputed, and puts all into a `ModelPart`. Each step is a function of its own.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from importlib import import_module

from torch import nn

from models.costs import layer_costs
from models.coverage import check_names, check_tensors
from models.family import FAMILIES
from models.initial_values import check_origin, set_initial_values
from models.layer import LayerSpec, blocks_mode_of
from models.shape import ModelShape
from models.shapes import shape_of
from parallel.activations.offload import InputsOnHost
from parallel.activations.recompute import Recomputed
from parallel.chunk.precision import master_dtype
from parallel.config import Config, PipelineConfig
from parallel.engine.context import Context
from parallel.engine.device import device_type
from parallel.layout.layout import ParameterInfo
from parallel.ops.kernels.table import can_be_given
from parallel.pipeline.microbatch import Limits
from parallel.pipeline.part import ModelPart, SetValues, StageInterface, keep_values
from parallel.pipeline.partition import from_layers, partition
from parallel.sequence import sequence_of
from parallel.tensor import MODES, Mode


def build(context: Context) -> ModelPart:
    """Return this rank's part, with weights from `model.path` where it has any, else drawn from the seed.

    Raises ConfigError or DataError, the latter on every rank.
    """
    check_origin(context)
    return part_of(context, partial(set_initial_values, config=context.config))


def part_of(
    context: Context,
    set_values: SetValues = keep_values,
    *,
    in_parts: bool | None = None,
    compile_options: Mapping[str, bool] | None = None,
) -> ModelPart:
    """Return this rank's part, with parameters in the dtype of the master weights.

    `set_values` gives them their values: at once or, `in_parts`, chunk by chunk when an engine is made of it; by
    default as `is_built_in_parts` says. Without it they are zero, to be read from a checkpoint. On the device "meta"
    they have sizes only. `compile_options` are those of torch's compiler for a model that generates, with blocks that
    are compiled for single tokens; without them the model is one to train.
    """
    config, mode = context.config, mode_of(context)
    in_parts = is_built_in_parts(config) if in_parts is None else in_parts
    specs_of_stages = specs_of_part(context, mode)
    specs = [spec for specs in specs_of_stages.values() for spec in specs]
    blocks = [spec.name for spec in specs if spec.is_block]
    layers = {spec.name: build_layer(spec, keep_storage=not in_parts) for spec in specs}
    tie_embeddings(layers)
    shape = shape_of(config)
    check_names(layers, shape)
    infos = parameter_infos(layers, shape)
    check_tensors(layers, infos, shape)
    if not in_parts:
        set_values(infos)
    if config.train.compile and (compile_options is not None or not have_kernels(context, shape.hidden_size)):
        compile_layers(layers, blocks, compile_options)
    inputs = InputsOnHost(context.device) if config.train.activation_checkpointing == "offload" else None
    if config.train.activation_checkpointing != "none":
        layers = recomputed(layers, blocks, inputs)
    return ModelPart(
        {stage: [layers[spec.name] for spec in specs] for stage, specs in specs_of_stages.items()},
        infos,
        interface=interface_of(context, mode),
        units={name: layers[name] for name in blocks},
        set_initial_values=set_values if in_parts else keep_values,
        inputs=inputs,
    )


def is_built_in_parts(config: Config) -> bool:
    """Return whether a rank must never hold all of its part on the device, not even at the start."""
    return config.zero.stage == 3 or config.zero.tensor_placement_policy != "cuda"


def mode_of(context: Context) -> Mode:
    """Return the tensor mode that the config names. It makes parameters in the dtype of the master weights."""
    parallel, compiles = context.config.parallel, context.config.train.compile
    return MODES[parallel.tensor.kind](
        context.mesh,
        master_dtype(context.dtype),
        sequence=sequence_of(context.mesh, parallel.context, compiles=compiles),
        overlaps=parallel.tensor.overlap,
    )


# -- which layers ------------------------------------------------------------------------------------------------------


def specs_of_part(context: Context, mode: Mode) -> dict[int, list[LayerSpec]]:
    """Return the layers of each pipeline stage that this rank holds, in order, by the number of the stage."""
    config = context.config
    shape = shape_of(config)
    specs: list[LayerSpec] = import_module(FAMILIES[shape.model_type].layers).layers_of(shape, mode, config.train.seed)
    stages = layers_of_stages(costs_of(config), config.parallel.pipeline)
    own = config.parallel.pipeline.stages_of(context.mesh.axis("pipe").rank)
    return {stage: [specs[i] for i in stages[stage]] for stage in own}


def layers_of_stages(costs: Sequence[float], pipeline: PipelineConfig) -> Sequence[range]:
    """Return the layers of each stage: as `pipeline.layers` says, else so that the stages' costs are even."""
    if pipeline.layers is not None:
        return from_layers(len(costs) - 2, pipeline.layers)
    return _stages_by_cost(tuple(costs), pipeline.num_stages, pipeline.num_chunks)


@lru_cache(maxsize=1)  # `--check` builds the part of each rank
def _stages_by_cost(costs: tuple[float, ...], num_stages: int, chunks: int) -> tuple[range, ...]:
    return tuple(partition(costs, num_stages, chunks))


def costs_of(config: Config) -> list[float]:
    """Return the cost of each layer, on the type of device that a run on this machine would use."""
    return layer_costs(shape_of(config), config.data.sequence_length, device_type(config.train.device))


# -- the layers --------------------------------------------------------------------------------------------------------


def build_layer(spec: LayerSpec, *, keep_storage: bool) -> nn.Module:
    """Return the layer, its parameters zero or, without `keep_storage`, with no memory of their own.

    Without it, at most one layer of the stage is in memory at a time.
    """
    layer = spec.build()
    if not keep_storage:
        for parameter in layer.parameters():
            parameter.data.untyped_storage().resize_(0)
    return layer


def tie_embeddings(layers: dict[str, nn.Module]) -> None:
    """Make the head use the embedding's parameter, on a rank that has both, unless it has a table of its own.

    Otherwise the first and the last stage have a copy each, and the layout of the copies sums their gradients.
    """
    if "embed" in layers and "head" in layers and layers["head"].is_tied:
        layers["head"].table = layers["embed"].table


def have_kernels(context: Context, hidden: int) -> bool:
    """Return whether the blocks of a model to train, with rows of `hidden` elements, are made of kernels here.

    Then these do all that is not a product or attention, and take less time than the compiler's: its blocks kept an
    H200 busy for 127.0 and 61.7 ms a step of OPT-1.3b and 125m, the kernels for 119.6 and 57.9 ms.
    """
    is_gpu = context.device.type == "cuda"
    return is_gpu and all(can_be_given(name, context.dtype, row=hidden) for name in ("norm", "activation", "heads"))


def compile_layers(
    layers: dict[str, nn.Module], names: Iterable[str], options: Mapping[str, bool] | None = None
) -> None:
    """Let torch.compile compile the forward of each of these layers, with these options, when it is first called."""
    for name in names:
        layers[name].compile(options=dict(options) if options else None)


def recomputed(layers: dict[str, nn.Module], names: Iterable[str], inputs: InputsOnHost | None) -> dict[str, nn.Module]:
    """Return the layers, those named here wrapped so that they keep only their input and run again in backward.

    `inputs`: the host storage that the inputs are offloaded to; None keeps them on the device.
    """
    return layers | {name: Recomputed(layers[name], inputs) for name in names}


# -- what the engine must know of them ---------------------------------------------------------------------------------


def parameter_infos(layers: dict[str, nn.Module], shape: ModelShape) -> list[ParameterInfo]:
    """Return every parameter of these layers, once, with its layout and its public names."""
    infos: dict[int, ParameterInfo] = {}
    for layer, module in layers.items():
        for path, part in module.named_modules():
            for name, layout in getattr(part, "layouts", {}).items():
                parameter = getattr(part, name)
                full = ".".join(filter(None, (layer, path, name)))
                infos.setdefault(id(parameter), ParameterInfo(full, layer, parameter, layout, shape.sources(full)))
    return list(infos.values())


def interface_of(context: Context, mode: Mode) -> StageInterface:
    """Return the shape and dtype of the activations between stages, and the batches that the model can be given."""
    shape = shape_of(context.config)
    blocks_mode = blocks_mode_of(shape, mode)
    return StageInterface(
        activation_shape=lambda batch, sequence: blocks_mode.activation_shape(batch, sequence, shape.hidden_size),
        dtype=context.dtype,
        is_counted=mode.counts_for(mode.inner_batch),
        limits=Limits(
            shape.vocab_size,
            shape.max_positions,
            context.config.parallel.sequence_parts,
            first_position=shape.first_position,
            has_documents=mode.sequence.has_documents,
        ),
    )

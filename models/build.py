"""Model × mode × stage: this rank's part of the model that a config names."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from models.hf import has_weights, load, sources
from models.opt import Block, LayerSpec, blocks_mode_of, layers_of
from models.shapes import OPTShape, layer_costs, shape_of
from parallel.activations.offload import InputsOnHost
from parallel.activations.recompute import Recomputed
from parallel.chunk.precision import master_dtype
from parallel.config import Config, PipelineConfig
from parallel.engine.context import Context
from parallel.engine.device import device_type
from parallel.layout.layout import ParameterInfo
from parallel.layout.rng import draw_normal
from parallel.pipeline.microbatch import Limits
from parallel.pipeline.partition import from_layers, partition
from parallel.pipeline.stage import Stage
from parallel.sequence import sequence_of
from parallel.tensor import MODES


def build(context: Context) -> Stage:
    """This rank's stage, with weights from `model.path` where it has them, else drawn from the seed: now or, where it
    `comes_in_parts`, a chunk at a time as an engine takes it over.

    Raises ConfigError or DataError.
    """
    stage = outline(context)
    if not comes_in_parts(context.config):
        fill(stage.infos, context.config)
    else:
        stage.fill = partial(fill, config=context.config)
    return stage


def comes_in_parts(config: Config) -> bool:
    """Whether a rank is not to hold its stage whole on the device, not even at first."""
    return config.zero.stage == 3 or config.zero.tensor_placement_policy != "cuda"


def fill(infos: Sequence[ParameterInfo], config: Config) -> None:
    """Give these parameters the values that a training begins with."""
    path = config.model.path
    if path is not None and has_weights(Path(path)):
        load(Path(path), [piece for info in infos for piece in info.pieces()])
    else:
        initialize(infos, shape_of(config), config.train.seed)


def outline(context: Context) -> Stage:
    """This rank's stage, its parameters zero, in master precision; on device 'meta' it only tells their sizes."""
    config = context.config
    shape = shape_of(config)
    mode = MODES[config.parallel.tensor.mode](
        context.mesh,
        master_dtype(context.dtype),
        sequence=sequence_of(context.mesh, config.parallel.context, compiles=config.train.compile),
        compiles=config.train.compile,
    )
    specs = layers_of(shape, mode, config.train.seed)
    own = split(costs_of(config), config.parallel.pipeline)[context.mesh.axis("pipe").rank]
    layers = {specs[i].name: _built(specs[i], keep=not comes_in_parts(config)) for i in own}
    if config.train.compile:
        for layer in layers.values():
            if isinstance(layer, Block):
                layer.compile()
    if "embed" in layers and "head" in layers:  # tied: one parameter where one stage has both ends
        layers["head"].embed_tokens = layers["embed"].embed_tokens
    blocks_mode = blocks_mode_of(shape, mode)
    infos = _infos(layers)
    inputs = InputsOnHost(context.mesh.device) if config.train.activation_checkpointing == "offload" else None
    if config.train.activation_checkpointing != "none":
        layers = {n: Recomputed(layer, inputs) if isinstance(layer, Block) else layer for n, layer in layers.items()}
    stage = Stage(
        list(layers.values()),
        infos,
        boundary=lambda batch, sequence: blocks_mode.activation_shape(batch, sequence, shape.hidden_size),
        dtype=context.dtype,
        is_counted=mode.counts_for(mode.inner_batch),
        limits=Limits(shape.vocab_size, shape.max_position_embeddings, config.parallel.context.parts),
    )
    stage.inputs = inputs
    stage.units = {name: layer for name, layer in layers.items() if isinstance(layer, Block | Recomputed)}
    return stage


def costs_of(config: Config) -> list[float]:
    """Of each layer, on the devices of a run here."""
    return layer_costs(shape_of(config), config.data.sequence_length, device_type(config.train.device))


def split(costs: Sequence[float], pipeline: PipelineConfig) -> list[range]:
    """The layers of each stage: as the config gives them, else by cost."""
    if pipeline.layers is not None:
        return from_layers(len(costs) - 2, pipeline.layers)
    return partition(costs, pipeline.size)


def initialize(infos: Sequence[ParameterInfo], shape: OPTShape, seed: int) -> None:
    """Draw every weight as Hugging Face's OPT does, from its public name and the seed: the same in every layout.

    Matrices are normal with `init_std`, biases zero, LayerNorms one; the padding token's embedding is zero.
    """
    for info in infos:
        for piece in info.pieces():
            if len(piece.shape) == 1:
                piece.data.fill_(float(piece.name.endswith("layer_norm.weight")))
                continue
            drawn = draw_normal(piece.shape, piece.box, shape.init_std, seed, piece.name)
            start, stop = piece.box[0]
            if piece.name.endswith("embed_tokens.weight") and start <= shape.pad_token_id < stop:
                drawn[shape.pad_token_id - start] = 0
            piece.data.copy_(drawn)


def _built(spec: LayerSpec, *, keep: bool) -> nn.Module:
    """The layer, its parameters zero or, unless kept, without a storage: then no more than a layer is ever there."""
    layer = spec.build()
    if not keep:
        for parameter in layer.parameters():
            parameter.data.untyped_storage().resize_(0)
    return layer


def _infos(layers: dict[str, nn.Module]) -> list[ParameterInfo]:
    """Every parameter of these layers, once, with its layout and its public names."""
    infos: dict[int, ParameterInfo] = {}
    for layer, module in layers.items():
        for path, part in module.named_modules():
            for name, layout in getattr(part, "layouts", {}).items():
                parameter = getattr(part, name)
                full = ".".join(filter(None, (layer, path, name)))
                infos.setdefault(id(parameter), ParameterInfo(full, layer, parameter, layout, sources(full)))
    return list(infos.values())

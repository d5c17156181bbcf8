"""The checks that a model fits a layout: what axes must divide, each with the nearest values that would work.

This module needs no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from models.linears import block_linears, linears_in_8_bits
from models.shape import ModelShape
from parallel.config import Config, ParallelConfig, PipelineConfig, TensorConfig, TrainConfig
from parallel.errors import divisors, either, nearest, nearest_multiples, shown, times


def layout_problems(shape: ModelShape, config: Config) -> list[str]:
    """Return a line for each thing in which the model does not fit the layout of a config."""
    sequence_length, parallel = config.data.sequence_length, config.parallel
    found = _sequence_problems(shape, sequence_length, parallel)
    key = None if config.model.path else f"model.{shape.field('num_hidden_layers')}"
    found += _pipeline_problems(shape.num_hidden_layers, parallel.pipeline, key)
    found += _precision_problems(shape, config.train)
    tensor = _tensor_problems(shape, parallel.tensor)
    return found + (tensor or _head_problems(shape, sequence_length, parallel))


def _precision_problems(shape: ModelShape, train: TrainConfig) -> list[str]:
    """Return the problem of fp8 for a model all of whose linears are too small for it: nothing would be in 8 bits."""
    if train.precision != "fp8" or linears_in_8_bits(shape, train):
        return []
    largest = max(block_linears(shape), key=lambda linear: linear.elements)
    return [
        f"train.precision: 'fp8' would leave the whole model in bf16. Its largest linear, {largest}, has a weight of"
        f" {largest.elements:,} elements, and 8 bits gain from train.fp8_min_elements = {train.fp8_min_elements:,} on."
        " Try 'bf16', or train.fp8_min_elements=0, which takes all linears."
    ]


def _pipeline_problems(num_layers: int, pipeline: PipelineConfig, key: str | None) -> list[str]:
    """Return the problems of the pipeline: each layer must be on one stage, and each stage must have a layer.

    `key`: that of the number of layers; None where the model has its weights already.
    """
    if pipeline.num_stages > num_layers + 2:
        return [_too_many_stages(num_layers, pipeline, key)]
    wrong = "" if pipeline.layers is None else _layers_problem(num_layers, pipeline.layers, pipeline)
    if not wrong:
        return []
    tries = shown(_even(num_layers, pipeline.num_stages))
    return [f"parallel.pipeline.layers: {shown(pipeline.layers)} {wrong}. Try {tries}."]


def _too_many_stages(num_layers: int, pipeline: PipelineConfig, key: str | None) -> str:
    """Return the problem of more stages than layers, with the most chunks and the largest size that would work.

    Up to twice as many layers are named, too, by their `key`. The stages of a schedule's file are given: for them
    nothing else would work.
    """
    num_items, chunks = num_layers + 2, pipeline.num_chunks
    fewer, smaller = num_items // pipeline.size, num_items // chunks
    least = replace(pipeline, chunks=None).num_chunks
    needed, tries = pipeline.num_stages - 2, []
    if pipeline.file is not None:
        tries.append(f"{key}={needed}" if key else f"a model of {needed} layers")
    elif smaller:
        tries += [f"chunks={fewer}"] if fewer and not replace(pipeline, chunks=fewer).problems() else []
        tries.append(f"size={smaller}" if chunks > 1 else str(smaller))
    else:
        tries.append(f"chunks={fewer}" if fewer >= least else f"size={num_items // least}, chunks={least}")
    if key and needed <= 2 * num_layers and pipeline.file is None:
        tries.append(f"{key}={needed}")
    key, stages = ("size", pipeline.size) if chunks == 1 else ("chunks", _stages_text(pipeline))
    return (
        f"parallel.pipeline.{key}: {stages} stages are more than embedding, {num_layers} layers and head can fill."
        f" Try {', or '.join(tries)}."
    )


def _layers_problem(num_layers: int, layers: tuple[int, ...], pipeline: PipelineConfig) -> str:
    """Return what is wrong with the numbers of layers of the stages, or an empty text."""
    if len(layers) != pipeline.num_stages:
        return f"is for {len(layers)} stages, got {_stages_text(pipeline)}"
    if 0 in layers[1:-1]:
        return (
            f"leaves stage {layers.index(0, 1)} empty; only the first, which has the embedding, and the last, which has"
            " the head, may have no layers"
        )
    return "" if sum(layers) == num_layers else f"adds up to {sum(layers)}, but the model has {num_layers} layers"


def _stages_text(pipeline: PipelineConfig) -> str:
    chunks = {"chunks": pipeline.num_chunks} if pipeline.num_chunks > 1 else {}
    return times(size=pipeline.size, **chunks)


def _even(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Return an even split of the layers: one more goes to stages 1, 2, … and to stage 0, with the embedding, last."""
    some, more = divmod(num_layers, num_stages)
    return tuple(some + ((stage - 1) % num_stages < more) for stage in range(num_stages))


@dataclass(frozen=True)
class _Cut:
    """Widths that a tensor mode splits.

    Each of `sizes`, by its field of the model, must be divisible by `parts ** power`. A message names the number of
    parts by `name`, and other numbers that would work by `wording`, which are `parts ** total`.
    """

    sizes: Mapping[str, int]
    parts: int
    name: str
    wording: str
    power: int = 1
    total: int = 1

    def problems(self) -> list[str]:
        found = []
        for key, value in self.sizes.items():
            if value % self.parts**self.power:
                even = [part for part in divisors(value) if value % part**self.power == 0]
                tries = either(part**self.total for part in nearest(self.parts, even))
                found.append(f"model.{key}: {value} is not divisible by {self.name}. Try {self.wording.format(tries)}.")
        return found


def _tensor_problems(shape: ModelShape, tensor: TensorConfig) -> list[str]:
    """Return the widths that the tensor mode does not divide. The vocabulary may have any size: it is padded."""
    heads, inner, widths = shape.heads(), shape.inner_widths(), shape.widths()
    axes = tensor.axes()
    cuts: tuple[_Cut, ...]
    match tensor.mode:
        case "1d":
            cuts = (_Cut({**heads, **inner}, axes["t"], f"tensor.size {tensor.size}", "size {}"),)
        case "2d" | "2.5d":
            row, col = axes["row"], axes["col"]
            cuts = (
                _Cut({**heads, **widths}, col, f"the {col} columns of tensor.size {tensor.size}", "{} columns"),
                _Cut(widths, row, f"the {row} rows of tensor.size {tensor.size}", "{} rows"),
            )
        case "3d":
            edge, cube = axes["i"], f"the cube of tensor.size {tensor.size}"
            cuts = (
                _Cut(heads, edge, f"{edge}, the edge of {cube}", "size {}", total=3),
                _Cut(widths, edge, f"{edge} × {edge}, a face of {cube}", "size {}", power=2, total=3),
            )
        case _:
            cuts = ()
    return [problem for cut in cuts for problem in cut.problems()]


def _sequence_problems(shape: ModelShape, sequence_length: int, parallel: ParallelConfig) -> list[str]:
    """Return the problems of the sequence length: too few positions for it, or ranks that do not split it evenly."""
    parts, context = parallel.sequence_parts, parallel.context
    most, key = shape.max_positions, shape.field("max_position_embeddings")
    if sequence_length > most:
        return [f"data.sequence_length: {sequence_length} is more than model.{key} {most}. Try {most}."]
    if sequence_length % parts == 0:
        return []
    lengths = [n for n in nearest_multiples(sequence_length, parts) if n <= most]
    tries = [either(lengths)] if lengths else []
    if context.splits(sequence_length):  # further parts, those of 1d, are too many
        tries.append("parallel.tensor.sequence_parallel=False")
    else:
        sizes = parallel.context_sizes(sequence_length)
        tries += [f"parallel.context.size={either(nearest(context.size, sizes))}"] if sizes else []
    return [
        f"data.sequence_length: {sequence_length} is not a multiple of {parts}, the parts that"
        f" {_splits_of_sequences(parallel)} it into. Try {', or '.join(tries)}."
    ]


def _splits_of_sequences(parallel: ParallelConfig) -> str:
    """Return what splits sequences, with the verb, as a message says it."""
    context, tensor = parallel.context, parallel.tensor
    found = [f"parallel.context of size {context.size}, kind {context.kind!r},"] if context.size > 1 else []
    found += [f"parallel.tensor.sequence_parallel of size {tensor.size}"] if tensor.length_parts > 1 else []
    return f"{' and '.join(found)} {'splits' if len(found) == 1 else 'split'}"


def _head_problems(shape: ModelShape, sequence_length: int, parallel: ParallelConfig) -> list[str]:
    """Return the problem of heads that context parallelism cannot split: its kind 'all_to_all' exchanges heads."""
    context = parallel.context
    if context.size == 1 or context.kind != "all_to_all":
        return []
    axes = parallel.tensor.axes()
    tensor = axes.get("t", 1) * axes.get("col", 1) * axes.get("i", 1)
    for key, heads in shape.heads().items():
        if heads % (tensor * context.size):
            factors = {"the tensor mode's": tensor, "parallel.context.size": context.size}
            sizes = [n for n in parallel.context_sizes(sequence_length) if heads // tensor % n == 0]
            tries = [f"parallel.context.size={either(nearest(context.size, sizes))}"]
            ring = replace(parallel, context=replace(context, kind="ring"))
            tries += ["kind='ring'"] if sequence_length % ring.sequence_parts == 0 else []
            product = times(**{name: size for name, size in factors.items() if size > 1})
            return [
                f"model.{key}: {heads} is not divisible by {product}, over which kind 'all_to_all' splits heads too."
                f" Try {', or '.join(tries)}."
            ]
    return []

"""The sizes of OPT models, by name or from a Hugging Face directory, and the check that a config fits them.

This module needs no torch.
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from models.model_folder import hub_advice, read_config
from parallel.config import Config, ContextConfig, ModelConfig, ParallelConfig, PipelineConfig, TensorConfig
from parallel.config.reader import Reader
from parallel.errors import ConfigError, did_you_mean, divisors, either, nearest_multiples, shown, times

ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu", "tanh")
"""The activation functions that have the same name in Hugging Face and in torch."""


@dataclass(frozen=True)
class OPTShape:
    """Everything in which two OPT models can differ, under Hugging Face's names and with its defaults (OPT-125m)."""

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    word_embed_proj_dim: int = 768
    do_layer_norm_before: bool = True
    remove_final_layer_norm: bool = False
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_function: str = "relu"
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    init_std: float = 0.02
    pad_token_id: int = 1
    bos_token_id: int = 2
    eos_token_id: int = 2
    layerdrop: float = 0.0
    tie_word_embeddings: bool = True

    @property
    def has_final_layer_norm(self) -> bool:
        return self.do_layer_norm_before and not self.remove_final_layer_norm


def _published(layers: int, hidden: int, heads: int) -> OPTShape:
    """Return a row of table 1 of the OPT paper (Zhang et al., 2022, arXiv:2205.01068)."""
    return OPTShape(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_dim=4 * hidden,
        word_embed_proj_dim=hidden,
    )


NAMED = {
    "opt-tiny": replace(_published(4, 128, 8), vocab_size=260, dropout=0.0),
    "opt-125m": _published(12, 768, 12),
    "opt-350m": replace(_published(24, 1024, 16), word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _published(24, 2048, 32),
    "opt-2.7b": _published(32, 2560, 32),
    "opt-6.7b": _published(32, 4096, 32),
    "opt-13b": _published(40, 5120, 40),
    "opt-30b": _published(48, 7168, 56),
    "opt-66b": _published(64, 9216, 72),
    "opt-175b": _published(96, 12288, 96),
}


def from_hugging_face(path: str | Path) -> OPTShape:
    """Return the shape in DIR/config.json. A field that it leaves out has OPTConfig's default. Raises ConfigError."""
    names = [field.name for field in fields(OPTShape)]
    reader = Reader()
    # Where it is null, as where it is left out, the embedding is as wide as the model.
    found = read_config(path, fields=names, null=["word_embed_proj_dim"])
    read = reader.section(ModelConfig, found, (str(Path(path) / "config.json"),))
    if reader.problems:
        raise ConfigError(*reader.problems)
    # This is OPTConfig's default too: the embedding is as wide as the model unless the file says otherwise.
    width = OPTShape.hidden_size if read.hidden_size is None else read.hidden_size
    return _overridden(OPTShape(hidden_size=width, word_embed_proj_dim=width), read)


def _unknown_model(name: str) -> str:
    """Return the message about a model that is not known by its name."""
    own = name.rpartition("/")[2]
    if advice := hub_advice(name):
        drawn = f" Or set model.name={own!r}, with weights drawn from train.seed." if own in NAMED else ""
        return f"{name!r} is no name of a shape. {advice}{drawn}"
    return f"unknown model {shown(name)}. {did_you_mean(name, NAMED)}"


def _overridden(base: OPTShape, model: ModelConfig) -> OPTShape:
    """Return `base` with the fields that `model` sets. An embedding that was as wide as the model stays as wide."""
    values: dict[str, Any] = {field.name: getattr(model, field.name) for field in fields(OPTShape)}
    changes = {key: value for key, value in values.items() if value is not None}
    if base.word_embed_proj_dim == base.hidden_size and "hidden_size" in changes:
        changes.setdefault("word_embed_proj_dim", changes["hidden_size"])
    return replace(base, **changes)


def shape_of(config: Config) -> OPTShape:
    """Return the shape of a config's model. The config is resolved first if it is not yet. Raises ConfigError."""
    if any(getattr(config.model, field.name) is None for field in fields(OPTShape)):
        config, problems = resolve(config)
        if problems:
            raise ConfigError(*problems)
    return _overridden(OPTShape(), config.model)


def resolve(config: Config) -> tuple[Config, list[str]]:
    """Return the config with every field of its model set, and the problems: one line for each thing that does not fit.

    `parallel.config.parse` takes this function as its `resolve`.
    """
    model = config.model
    if model.path is None and model.name not in NAMED:
        return config, [f"model.name: {_unknown_model(model.name)}"]
    try:
        base = NAMED[model.name] if model.path is None else from_hugging_face(model.path)
    except ConfigError as error:
        return config, list(error.problems)
    shape = _overridden(base, model)
    problems = _model_problems(shape)
    sequence_length, parallel = config.data.sequence_length, config.parallel
    problems += _sequence_problems(shape, sequence_length, parallel.context)
    problems += _pipeline_problems(shape.num_hidden_layers, parallel.pipeline)
    tensor = _tensor_problems(shape, parallel.tensor)
    problems += tensor or _head_problems(shape, sequence_length, parallel)
    return replace(config, model=replace(model, **asdict(shape))), problems


def _model_problems(shape: OPTShape) -> list[str]:
    """Return the problems that the model has in every layout."""
    found = []
    if shape.hidden_size % shape.num_attention_heads:
        tries = either(_nearest(shape.num_attention_heads, divisors(shape.hidden_size)))
        found.append(
            f"model.num_attention_heads: {shape.num_attention_heads} does not divide model.hidden_size"
            f" {shape.hidden_size}. Try {tries}."
        )
    if shape.pad_token_id >= shape.vocab_size:
        found.append(
            f"model.pad_token_id: {shape.pad_token_id} is outside model.vocab_size {shape.vocab_size}."
            f" Try {shape.vocab_size - 1}."
        )
    if shape.activation_function not in ACTIVATIONS:
        hint = did_you_mean(shape.activation_function, ACTIVATIONS)
        found.append(f"model.activation_function: {shown(shape.activation_function)} is not available. {hint}")
    if shape.layerdrop > 0:
        found.append(f"model.layerdrop: {shape.layerdrop} is not available. Try 0.0.")
    return found


def _pipeline_problems(num_layers: int, pipeline: PipelineConfig) -> list[str]:
    """Return the problems of the pipeline: each layer must be on one stage, and each stage must have a layer."""
    if pipeline.size > num_layers + 2:
        return [
            f"parallel.pipeline.size: {pipeline.size} stages are more than embedding, {num_layers} layers and head can"
            f" fill. Try {num_layers + 2}."
        ]
    if pipeline.layers is not None and sum(pipeline.layers) != num_layers:
        some, more = divmod(num_layers, pipeline.size)
        # One more layer goes to stages 1, 2, … and to stage 0 last: it has the embedding already.
        even = tuple(some + ((stage - 1) % pipeline.size < more) for stage in range(pipeline.size))
        return [
            f"parallel.pipeline.layers: {shown(pipeline.layers)} adds up to {sum(pipeline.layers)}, but the model has"
            f" {num_layers} layers. Try {shown(even)}."
        ]
    return []


@dataclass(frozen=True)
class _Cut:
    """Widths that a tensor mode splits.

    Each field of the shape named in `keys` must be divisible by `parts ** power`. A message names the number of parts
    by `name`, and other numbers that would work by `wording`, which are `parts ** total`.
    """

    keys: tuple[str, ...]
    parts: int
    name: str
    wording: str
    power: int = 1
    total: int = 1

    def problems(self, shape: OPTShape) -> list[str]:
        found = []
        for key in self.keys:
            value = getattr(shape, key)
            if value % self.parts**self.power:
                even = [part for part in divisors(value) if value % part**self.power == 0]
                tries = either(part**self.total for part in _nearest(self.parts, even))
                found.append(f"model.{key}: {value} is not divisible by {self.name}. Try {self.wording.format(tries)}.")
        return found


def _tensor_problems(shape: OPTShape, tensor: TensorConfig) -> list[str]:
    """Return the widths that the tensor mode does not divide. The vocabulary may have any size: it is padded."""
    heads, widths = ("num_attention_heads",), ("hidden_size", "ffn_dim", "word_embed_proj_dim")
    axes = tensor.axes()
    cuts: tuple[_Cut, ...]
    match tensor.mode:
        case "1d":
            cuts = (_Cut((*heads, "ffn_dim"), axes["t"], f"tensor.size {tensor.size}", "size {}"),)
        case "2d" | "2.5d":
            row, col = axes["row"], axes["col"]
            cuts = (
                _Cut(heads + widths, col, f"the {col} columns of tensor.size {tensor.size}", "{} columns"),
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
    return [problem for cut in cuts for problem in cut.problems(shape)]


def _sequence_problems(shape: OPTShape, sequence_length: int, context: ContextConfig) -> list[str]:
    """Return the problems of the sequence length: too few positions for it, or ranks that do not split it evenly."""
    most = shape.max_position_embeddings
    if sequence_length > most:
        return [
            f"data.sequence_length: {sequence_length} is more than model.max_position_embeddings {most}. Try {most}."
        ]
    if context.splits(sequence_length):
        return []
    lengths = [n for n in nearest_multiples(sequence_length, context.parts) if n <= most]
    tries = [either(lengths)] if lengths else []
    tries.append(f"parallel.context.size={either(_nearest(context.size, context.sizes(sequence_length)))}")
    return [
        f"data.sequence_length: {sequence_length} is not a multiple of {context.parts}, the parts that parallel.context"
        f" of size {context.size}, kind {context.kind!r}, splits it into. Try {', or '.join(tries)}."
    ]


def _head_problems(shape: OPTShape, sequence_length: int, parallel: ParallelConfig) -> list[str]:
    """Return the problem of heads that context parallelism cannot split: its kind 'all_to_all' exchanges heads."""
    context, heads = parallel.context, shape.num_attention_heads
    if context.size == 1 or context.kind != "all_to_all":
        return []
    axes = parallel.tensor.axes()
    tensor = axes.get("t", 1) * axes.get("col", 1) * axes.get("i", 1)
    if heads % (tensor * context.size) == 0:
        return []
    factors = {"the tensor mode's": tensor, "parallel.context.size": context.size}
    sizes = [n for n in divisors(heads // tensor) if replace(context, size=n).splits(sequence_length)]
    tries = [f"parallel.context.size={either(_nearest(context.size, sizes))}"]
    tries += ["kind='ring'"] if replace(context, kind="ring").splits(sequence_length) else []
    return [
        f"model.num_attention_heads: {heads} is not divisible by"
        f" {times(**{name: size for name, size in factors.items() if size > 1})}, over which kind 'all_to_all' splits"
        f" heads too. Try {', or '.join(tries)}."
    ]


def _nearest(value: int, choices: list[int]) -> list[int]:
    """Return the three choices nearest to `value`, in order; 1 is among them only if there is no other."""
    larger = [choice for choice in choices if choice > 1] or choices
    return sorted(sorted(larger, key=lambda choice: abs(choice - value))[:3])

"""The model that texts are generated with: of a Hugging Face directory, such as a run's export, or of a checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from models.build import part_of
from models.data import has_token_ids
from models.generation_config import carried_ends, end_tokens, exported_shape, read_generation_config
from models.hf import check_weights
from models.initial_values import check_origin, set_initial_values
from models.layer import Embed
from models.model_folder import MOST_BYTES
from models.saved_model import MASTER, SavedModel
from models.shape import ModelShape
from models.shapes import from_hugging_face
from models.tokenizer import ByteTokenizer, Tokenizer, is_of_bytes, load_tokenizer
from parallel.checkpoint import checkpoint
from parallel.checkpoint.index import INDEX, Index
from parallel.checkpoint.newest import naming_the_one_before
from parallel.checkpoint.verify import verify
from parallel.config import DataConfig
from parallel.engine.context import Context
from parallel.engine.inference import Inference
from parallel.errors import ColonnadeError, DataError, NonFiniteError
from parallel.layout.finite import problem_of
from parallel.layout.layout import ParameterInfo
from parallel.mesh.agreement import Agreement
from parallel.pipeline.part import SetValues
from parallel.regular_file import check_entered, is_missing, read_json

PRECISIONS = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

F = TypeVar("F", bound=Callable[..., Any])

COMPILE_OPTIONS = MappingProxyType({"coordinate_descent_tuning": True})
"""An option with which torch's compiler makes kernels of its own for products with a single row."""


@dataclass(frozen=True)
class TrainedModel:
    """A model, its tokenizer and the tokens with which its texts end.

    `folder` is the directory of the weights: a Hugging Face directory or, where there is an `index`, a checkpoint.
    `tokenizer_path` is what the tokenizer was read from, as data.tokenizer names it. `precision` is the dtype of the
    weights, or that of the training.
    """

    folder: Path
    shape: ModelShape
    tokenizer: Tokenizer
    tokenizer_path: str
    ends: frozenset[int]
    precision: str
    index: Index | None = None

    @property
    def is_checkpoint(self) -> bool:
        """True if the weights are those of a checkpoint."""
        return self.index is not None

    @property
    def begin(self) -> int | None:
        """The token after which a text without a prompt begins, as in training: the one that ends a text."""
        end = self.tokenizer.end
        return self.shape.end_tokens[0] if end is None and self.shape.end_tokens else end

    def load(self, context: Context) -> Inference:
        """Return the weights of this rank in the layout of a context. Every rank calls this.

        Raises ConfigError, DataError or CheckpointError on every rank; NonFiniteError where a weight is not finite,
        also because it is too large for the precision.
        """
        set_values = partial(set_initial_values, config=context.config)
        if self.index is not None:
            set_values = partial(_read_checkpoint, index=self.index)
            with naming_the_one_before(self.folder):
                verify(self.index, context.mesh.world)
        else:
            check_origin(context)
        found = inference_of(context, set_values)
        pieces = (piece for chunk in found.chunks for piece in chunk.spec.pieces(chunk.parameters.own))
        problem = problem_of(pieces)
        problem = problem and f"{self.folder}: {problem}."
        Agreement(context.mesh.world).agree_on("a check of the weights", problem, NonFiniteError)
        return found


def inference_of(context: Context, set_values: SetValues) -> Inference:
    """Return the weights of this rank, which `set_values` fills chunk by chunk, in the dtype of the run.

    With train.compile, blocks are compiled; in a single process the embedding, too.
    """
    part = part_of(context, set_values, in_parts=True, compile_options=COMPILE_OPTIONS)
    if context.config.train.compile and context.mesh.world.size == 1:
        for layer in part.layers:
            if isinstance(layer, Embed):
                layer.forward = compiled(layer.forward)  # type: ignore[method-assign]
    return Inference(part, context)


def compiled(function: F) -> F:
    """Return the function, which torch's compiler compiles with the options of the blocks when it is called."""
    return torch.compile(function, options=dict(COMPILE_OPTIONS))  # type: ignore[return-value]


def find_trained_model(folder: Path, tokenizer: str | None = None) -> TrainedModel:
    """Return the model that a path names: a Hugging Face directory, a checkpoint, or the latest checkpoint of a run.

    `tokenizer` is used in place of its own, and named as data.tokenizer is. Raises ConfigError, DataError or
    CheckpointError.
    """
    kind = _kind(folder)
    if kind == "run" and checkpoint.resolve_latest(folder / checkpoint.CHECKPOINTS) is None:
        folder, kind = folder / "export", _kind(folder / "export")
    trained = _of_directory(folder, tokenizer) if kind == "model" else _of_checkpoint(folder, tokenizer)
    if trained.tokenizer.vocab_size > trained.shape.vocab_size:
        raise DataError(
            f"{folder}: its tokenizer has {trained.tokenizer.vocab_size} ids, but the model's vocabulary only"
            f" {trained.shape.vocab_size}. Put the one there that the model was trained with."
        )
    return trained


def _kind(folder: Path) -> str:
    """Return "model" for a Hugging Face directory, "run" for the folder of a run, else "checkpoint"."""
    check_entered(folder, DataError)
    try:
        content = read_json(folder / "config.json", DataError, at_most=MOST_BYTES, links=True)
    except DataError:
        names_one = folder.name in (checkpoint.BEST, checkpoint.LATEST) and folder.is_file()
        is_checkpoint = names_one or (folder / INDEX).is_file() or any(folder.glob("step_*"))
        is_run = (folder / checkpoint.CHECKPOINTS).is_dir()
        return "checkpoint" if is_checkpoint else "run" if is_run else "model"
    return "run" if isinstance(content, dict) and isinstance(content.get("model"), dict) else "model"


def _of_directory(folder: Path, tokenizer: str | None) -> TrainedModel:
    if is_missing(folder / "config.json"):
        problem = "there is no config.json" if folder.is_dir() else "there is no such folder"
        raise DataError(
            f"{folder}: {problem}. Name the export folder of a run, a Hugging Face directory, or a checkpoint."
        )
    shape = from_hugging_face(folder)
    check_weights(folder, shape)
    raw = read_json(folder / "config.json", DataError, at_most=MOST_BYTES, links=True)
    stored = str(raw.get("dtype") or raw.get("torch_dtype"))
    ends = end_tokens(read_generation_config(folder), shape)
    found = _tokenizer_beside(folder) if tokenizer is None else load_tokenizer(tokenizer)
    return TrainedModel(folder, shape, found, tokenizer or str(folder), frozenset(ends), PRECISIONS.get(stored, "fp32"))


def _tokenizer_beside(folder: Path) -> Tokenizer:
    """Return the tokenizer of a directory. The byte tokenizer needs no library to be read again."""
    file = folder / "tokenizer.json"
    if is_missing(file):
        raise DataError(
            f"{folder}: there is no tokenizer.json. Put the one there that the model was trained with, or name it:"
            " --tokenizer DIR."
        )
    return ByteTokenizer() if is_of_bytes(file) else load_tokenizer(str(folder))


def _of_checkpoint(folder: Path, tokenizer: str | None) -> TrainedModel:
    found = checkpoint.find_checkpoint(str(folder), "CHECKPOINT")
    with naming_the_one_before(found):
        saved = SavedModel.of(Index.read(found))
    path = tokenizer or _named_tokenizer(found, saved.config.data)
    try:
        used = load_tokenizer(path)
        ends = _ends_of_export(saved.shape, used, saved.config.model.path)
    except ColonnadeError as error:
        raise DataError(
            f"{found}: {error} Relative paths of its run are looked up in the working directory. Or name an export."
        ) from error
    return TrainedModel(found, saved.shape, used, path, ends, saved.config.train.precision, saved.index)


def _named_tokenizer(found: Path, data: DataConfig) -> str:
    """Return the tokenizer that a run's data named. Raises DataError where they are token ids and named none."""
    if data.tokenizer != "bytes":
        return data.tokenizer
    try:
        has_ids = has_token_ids(data.path)
    except DataError as error:
        raise DataError(f"{found}: {error} Or name the tokenizer of its run: --tokenizer bytes, or DIR.") from error
    if has_ids:
        raise DataError(
            f"{found}: its run was trained on the token ids of {data.path}, and data.tokenizer names no tokenizer. Name"
            " it: --tokenizer DIR."
        )
    return data.tokenizer


def _ends_of_export(shape: ModelShape, tokenizer: Tokenizer, path: str | None) -> frozenset[int]:
    """Return the tokens that would end a text of the run's export."""
    ends = exported_shape(shape, tokenizer).end_tokens
    generation = None if path is None else read_generation_config(path)
    return frozenset(ends if generation is None else carried_ends(generation, ends=ends, before=shape.end_tokens))


def _read_checkpoint(infos: Sequence[ParameterInfo], index: Index) -> None:
    """Read the weights that a run saved, in the precision of the master weights, into parameters of any dtype."""
    pieces = (piece for info in infos for piece in info.pieces())
    index.archive.read_into(replace(piece, name=f"{MASTER}{piece.name}") for piece in pieces)

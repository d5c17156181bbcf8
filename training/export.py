"""The export of a run: what a Hugging Face directory has beside weights, and the export of a checkpoint afterwards."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from models.generation_config import (
    GenerationConfig,
    exported_shape,
    read_generation_config,
    write_generation_config,
)
from models.hf import export_whole, not_exported
from models.saved_model import SavedModel, widest_dtype
from parallel.checkpoint import checkpoint
from parallel.checkpoint.hf_folder import too_large
from parallel.checkpoint.index import Index
from parallel.checkpoint.newest import naming_the_one_before
from parallel.checkpoint.replaced_folder import replace_files, replace_folder
from parallel.checkpoint.verify import verify
from parallel.config import Config
from parallel.engine.context import DTYPES, dtype_name
from parallel.errors import CheckpointError, ColonnadeError, ConfigError, DataError, NonFiniteError
from parallel.layout.finite import problem_of
from parallel.layout.layout import Piece
from parallel.mesh.mesh import ALONE
from parallel.storage.folders import standing_folder
from training.inputs import tokenizer_of

T = TypeVar("T")

EVERYTHING = re.compile(".*")


def find_saved_model(name: str) -> SavedModel:
    """Return the model of a checkpoint, or of the newest one of a run's folder.

    Raises CheckpointError, by the name of the file, for one that is missing, damaged, or of another program.
    """
    folder = checkpoint.find_checkpoint(os.path.expanduser(name), "CHECKPOINT")
    with naming_the_one_before(folder):
        index = Index.read(folder)
        verify(index, ALONE)
    return SavedModel.of(index)


def check_target(target: Path, saved: SavedModel) -> None:
    """Raise ConfigError where an export cannot be written into this folder, or would replace other files."""
    standing_folder(target, lambda problem: ConfigError(f"--to: {problem} Name another folder."))
    if target.is_relative_to(saved.folder.resolve()):
        raise ConfigError(f"--to: {target} lies in the checkpoint, which is deleted one day. Name another folder.")
    if target.exists() and (other := not_exported(target)):
        raise ConfigError(
            f"--to: {target} is not empty, and {other} in it is no file of an earlier export. Name a new folder."
        )


def export_checkpoint(saved: SavedModel, target: Path, dtype: str | None = None) -> tuple[torch.dtype, list[str]]:
    """Write what the run's own export would be after this step; return its dtype, and messages of what is missing.

    `dtype` is one of DTYPES, by default that of the run's export. This process does it alone, and has one tensor in
    memory at a time. The folder gets its name when it is complete; an earlier export there is replaced. Raises
    CheckpointError, also where a value is too large for a dtype that was asked for; NonFiniteError, and leaves an
    earlier export as it is, where a weight is not finite.
    """
    chosen, messages = _dtype_for(saved, dtype)
    tokenizer = _or_message(lambda: tokenizer_of(saved.config), "no tokenizer", messages)
    shape = exported_shape(saved.shape, tokenizer)
    generation = _or_message(lambda: _generation_of(saved.config), "no generation_config.json", messages)
    is_empty = target.exists() and not any(target.iterdir())  # it may be a mount, or where a shell is: it stays
    with replace_files(target, EVERYTHING, ALONE) if is_empty else replace_folder(target, ALONE) as temporary:
        tensors = (_checked(piece, saved.folder).data.to(chosen) for piece in saved.tensors())
        export_whole(temporary, tensors, shape=shape, dtype=chosen, tokenizer=tokenizer)
        if generation is not None:
            write_generation_config(temporary, generation, ends=shape.end_tokens, before=saved.shape.end_tokens)
    return chosen, messages


def _checked(piece: Piece, folder: Path) -> Piece:
    """Return the same piece. Raises NonFiniteError where it has a number that is not finite."""
    if problem := problem_of([piece]):
        raise NonFiniteError(f"{folder}: {problem}. It is not exported. Name an earlier checkpoint.")
    return piece


def _dtype_for(saved: SavedModel, dtype: str | None) -> tuple[torch.dtype, list[str]]:
    """Return the dtype of the export, and a message where it is not that of the run's config."""
    widest, name = widest_dtype(saved.config), dtype or saved.config.output.export_dtype
    chosen = widest if name is None else DTYPES[name]
    if torch.finfo(chosen).max >= torch.finfo(widest).max:
        return chosen, []
    problem = too_large(((piece, chosen) for piece in saved.tensors()), ALONE)
    if problem and dtype is not None:
        raise CheckpointError(f"--dtype: {dtype}: {problem} Choose a dtype with a larger range, such as fp32.")
    if problem:
        return widest, [f"output.export_dtype: {name}: {problem} The export is {dtype_name(widest)}"]
    return chosen, []


def _generation_of(config: Config) -> GenerationConfig | None:
    path = config.model.path
    if path is not None and not Path(path).is_dir():
        raise DataError(f"model.path: {path} is not a directory.")
    return None if path is None else read_generation_config(path)


def _or_message(read: Callable[[], T], missing: str, messages: list[str]) -> T | None:
    """Return what `read` returns; None, and a message of what is missing and why, where it raises."""
    try:
        return read()
    except ColonnadeError as error:
        messages.append(f"{missing}: {error} Relative paths of the run are looked up in the working directory.")
        return None

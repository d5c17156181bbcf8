"""The values that parameters have before the first step: read from a Hugging Face directory, or drawn from the seed."""

import logging
from collections.abc import Sequence

from models.hf import check_weights, has_weights, load_weights, too_large
from models.shape import ModelShape
from models.shapes import shape_of
from models.weight_files import files_of
from parallel.config import Config
from parallel.engine.context import Context
from parallel.errors import ColonnadeError, DataError, names_text
from parallel.layout.layout import ParameterInfo
from parallel.layout.rng import draw_normal
from parallel.mesh.collectives import gather_objects

NO_FILES = "no weights"

log = logging.getLogger(__name__)


def check_origin(context: Context) -> None:
    """Check, on all ranks together, where the initial values come from: the files in `model.path`, or the seed.

    Raises DataError on every rank where the files cannot be used on one of them, or where ranks see different files;
    ConfigError where there is no shape of a model.
    """
    config, path = context.config, context.config.model.path
    if path is None:
        return
    shape, files, problem = None, "", None
    try:
        shape = shape_of(config)
        found = files_of(path)
        if found:
            check_weights(path, shape)
            _check_range(context, path, shape)
        files = ", ".join(f"{file.name} of {file.stat().st_size} bytes" for file in found) or NO_FILES
    except ColonnadeError as error:
        problem = type(error), str(error)
    everywhere = gather_objects((shape, files, problem), context.mesh.world)
    if problems := list(dict.fromkeys(problem for *_, problem in everywhere if problem)):
        kind, _ = problems[0]
        raise kind("\n".join(text for _, text in problems))
    if len({(shape, files) for shape, files, _ in everywhere}) > 1:
        ranks = "; ".join(f"rank {rank}: {files}" for rank, (_, files, _) in enumerate(everywhere))
        raise DataError(
            f"model.path: {path} is not the same on every rank, in its config.json or in its weights: {ranks}. Give"
            " every rank the same files."
        )
    if files == NO_FILES and context.place.rank == 0:
        log.warning("%s has no weights: they are drawn from train.seed %d", path, config.train.seed)


def _check_range(context: Context, path: str, shape: ModelShape) -> None:
    """Raise DataError if weights are infinite in the precision of the run. Each rank reads a part of the tensors."""
    world = context.mesh.world
    if found := too_large(path, shape, context.dtype, part=world.rank, parts=world.size):
        raise DataError(
            f"model.path: {path} has weights that are too large for train.precision {context.config.train.precision}:"
            f" {names_text(found)}. Try bf16."
        )


def set_initial_values(infos: Sequence[ParameterInfo], config: Config) -> None:
    """Set these parameters to the weights in `model.path` if it has any, else to values drawn from `train.seed`."""
    path = config.model.path
    if path is not None and has_weights(path):
        load_weights(path, shape_of(config), [piece for info in infos for piece in info.pieces()])
    else:
        draw_parameters(infos, shape_of(config), config.train.seed)


def draw_parameters(infos: Sequence[ParameterInfo], shape: ModelShape, seed: int) -> None:
    """Draw every weight as Hugging Face does, from its public name and the seed: the same in every layout.

    The embedding of the padding token is zero.
    """
    for piece in (piece for info in infos for piece in info.pieces()):
        wanted = shape.initial(piece.name)
        if wanted.std == 0:
            piece.data.fill_(wanted.mean)
            continue
        drawn = draw_normal(piece.shape, piece.box, wanted.std, seed, piece.name) + wanted.mean
        start, stop = piece.box[0]
        if piece.name == shape.embedding and shape.padding_row is not None and start <= shape.padding_row < stop:
            drawn[shape.padding_row - start] = 0
        piece.data.copy_(drawn)

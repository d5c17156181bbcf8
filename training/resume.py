"""The start of a run: a checkpoint that it resumes from, weights that it reads, or weights drawn from the seed."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.data import Corpus
from models.hf import has_weights
from models.shape import ModelShape
from models.shapes import MODEL_TYPE, fields_of, shape_from, shape_of
from parallel.checkpoint import checkpoint
from parallel.config import Config
from parallel.errors import CheckpointError, ConfigError
from training.best_loss import BestLoss
from training.history import History
from training.same_data import check_same_data, corpus_record, resume_messages, samples_taken


def find_checkpoint(config: Config, resume: str | None, corpus: Corpus) -> Path | None:
    """Return the checkpoint that `--resume` names; "auto" is the newest of the run, or None if it has none yet.

    Raises CheckpointError if the checkpoint is damaged, of another model, at a place in other data, or not there.
    """
    named = None if resume is None else os.path.expanduser(resume)
    found = None if named is None else checkpoint.find_checkpoint(named, Path(config.output.dir))
    if found is None:
        return None
    with naming_the_one_before(found):
        checkpoint.check_files(found)
    check_same_model(found, shape_of(config))
    check_same_data(found, checkpoint.read_metadata(found), config, corpus)
    return found


@contextmanager
def naming_the_one_before(found: Path, option: str = "--resume ") -> Iterator[None]:
    """Have a CheckpointError about a damaged checkpoint name the one before it, after `option`, if there is one."""
    try:
        yield
    except CheckpointError as error:
        if earlier := checkpoint.previous_checkpoint(found):
            raise CheckpointError(f"{error} Try {option}{earlier}.") from error
        raise


def start_messages(config: Config, resume: str | None, found: Path | None) -> list[str]:
    """Return the messages about what a run starts from: `found`, the checkpoint for `--resume`, or else its weights."""
    if found is not None:
        return [f"resuming from {found}", *resume_messages(checkpoint.read_metadata(found), config)]
    path = config.model.path
    drawn = path is None or not has_weights(path)
    origin = f"weights drawn from train.seed {config.train.seed}" if drawn else f"weights from {path}"
    if drawn and path is not None:
        origin += f": {path} has none"
    if resume is None:
        return [origin]
    return [f"nothing to resume in {config.output.dir}: starting from the beginning", origin]


def check_same_model(folder: Path, shape: ModelShape) -> None:
    """Raise CheckpointError if the checkpoint is of another function than this model."""
    try:
        saved = shape_from(checkpoint.read_metadata(folder)["model"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"--resume: {folder} is not a checkpoint of this program: {error}.") from error
    ours, theirs = fields_of(shape), fields_of(saved)
    if saved.model_type != shape.model_type:  # they have other fields, too, and not because a size differs
        ours = {MODEL_TYPE: shape.model_type}
    keys = [key for key in ours if key not in shape.may_change and ours[key] != theirs.get(key)]
    if keys:
        differing = "; ".join(f"{key} {theirs.get(key)}, not {ours[key]}" for key in keys)
        raise CheckpointError(f"--resume: {folder} is of another model: it has {differing}.")


def metadata_of(config: Config, counters: Mapping[str, Any], corpus: Corpus, history: History) -> dict[str, Any]:
    """Return what a checkpoint says about its run."""
    return {
        "step": counters["step"],
        "counters": dict(counters),
        "model": fields_of(shape_of(config)),
        "config": config.to_dict(),
        "corpus": corpus_record(corpus),
        "best": history.best.state(),
        "recent": history.outliers.state(),
    }


def counters_of(folder: Path) -> dict[str, Any]:
    """Return the counters with which an engine goes on from this checkpoint."""
    metadata = checkpoint.read_metadata(folder)
    return {**metadata["counters"], "samples": samples_taken(metadata)}


def history_of(folder: Path | None) -> History:
    """Return the losses that a run had had when it saved this checkpoint."""
    found = History()
    if folder is not None:
        metadata = checkpoint.read_metadata(folder)
        found = History(BestLoss.restored(metadata.get("best")))
        found.outliers.restore(metadata.get("recent"))
    return found

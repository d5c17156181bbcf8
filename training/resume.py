"""The start of a run: a checkpoint that it resumes from, weights that it reads, or weights drawn from the seed."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.data import Corpus
from models.hf import has_weights
from models.shape import ModelShape
from models.shapes import MODEL_TYPE, fields_of, shape_from, shape_of
from parallel.checkpoint import checkpoint
from parallel.checkpoint.index import Index
from parallel.checkpoint.newest import FoundCheckpoint, PassedOver, find_newest, naming_the_one_before
from parallel.config import Config
from parallel.engine.counters import check_counters
from parallel.errors import CheckpointError, ColonnadeError, ConfigError
from training.best_loss import BestLoss
from training.loss_history import LossHistory
from training.same_data import check_same_data, corpus_record, resume_messages, samples_taken

AUTO = "auto"


def find_start(config: Config, resume: str | None) -> FoundCheckpoint | None:
    """Return the checkpoint that `--resume` names; "auto" is the newest whole one of the run, or None without any.

    Of the files only their sizes have been looked at. Raises CheckpointError if it is damaged or not there.
    """
    if resume is None:
        return None
    if resume == AUTO:
        with naming("--resume auto: "):
            return find_newest(Path(config.output.dir) / checkpoint.CHECKPOINTS)
    folder = checkpoint.find_checkpoint(os.path.expanduser(resume))
    with naming_the_one_before(folder, "--resume "):
        return FoundCheckpoint(Index.read(folder))


def find_another(found: FoundCheckpoint, resume: str | None, damage: CheckpointError) -> FoundCheckpoint:
    """Return the newest whole checkpoint without `found`, whose contents are damaged. Only "auto" takes another one.

    Raises CheckpointError where there is none.
    """
    folder = found.index.folder
    if resume != AUTO:
        with naming_the_one_before(folder, "--resume "):
            raise damage
    with naming("--resume auto: "):
        other = find_newest(folder.parent, [*found.passed_over, PassedOver.by(folder, damage)])
    assert other is not None
    return other


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Have a CheckpointError begin with the option that asked for the checkpoint."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{option}{error}") from error


def set_aside(found: FoundCheckpoint) -> None:
    """Rename the checkpoints that were passed over: the next save deletes damaged ones, and no whole one before them.

    One that could not be read this time may be whole, and no save deletes it: its name does not begin with a dot. Rank
    0 alone calls this. Raises OSError.
    """
    for one in found.passed_over:
        folder, name = one.folder, one.folder.name.lstrip(".")
        aside = folder.with_name(f".{name}.damaged" if one.is_damaged else f"{name}.unreadable")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def check_start(found: FoundCheckpoint, config: Config, corpus: Corpus) -> None:
    """Raise CheckpointError if a run with this config and corpus cannot go on from a checkpoint.

    It is of another program or model, or at a place in other data.
    """
    folder, metadata = found.index.folder, found.index.metadata
    try:
        check_same_model(found.index, shape_of(config))
        check_counters(found.index)
        check_same_data(folder, metadata, config, corpus)
        list(resume_messages(metadata, config))
        history_of(found)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, ColonnadeError):
            raise
        raise CheckpointError(f"--resume: {folder} is not a checkpoint of this program: {error}.") from error


def start_messages(config: Config, resume: str | None, found: FoundCheckpoint | None) -> list[str]:
    """Return the messages about what a run starts from: `found`, the checkpoint for `--resume`, or else its weights."""
    if found is not None:
        resumed = f"resuming from {found.index.folder}"
        return [*found.messages, resumed, *resume_messages(found.index.metadata, config)]
    path = config.model.path
    drawn = path is None or not has_weights(path)
    origin = f"weights drawn from train.seed {config.train.seed}" if drawn else f"weights from {path}"
    if drawn and path is not None:
        origin += f": {path} has none"
    if resume is None:
        return [origin]
    return [f"nothing to resume in {config.output.dir}: starting from the beginning", origin]


def check_same_model(index: Index, shape: ModelShape) -> None:
    """Raise CheckpointError if the checkpoint is of another function than this model."""
    try:
        saved = shape_from(index.metadata["model"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"--resume: {index.folder} is not a checkpoint of this program: {error}.") from error
    ours, theirs = fields_of(shape), fields_of(saved)
    if saved.model_type != shape.model_type:  # they have other fields, too, and not because a size differs
        ours = {MODEL_TYPE: shape.model_type}
    keys = [key for key in ours if key not in shape.may_change and ours[key] != theirs.get(key)]
    if keys:
        differing = "; ".join(f"{key} {theirs.get(key)}, not {ours[key]}" for key in keys)
        raise CheckpointError(f"--resume: {index.folder} is of another model: it has {differing}.")


def metadata_of(config: Config, counters: Mapping[str, Any], corpus: Corpus, history: LossHistory) -> dict[str, Any]:
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


def counters_of(index: Index) -> dict[str, Any]:
    """Return the counters with which an engine goes on from this checkpoint."""
    return {**index.metadata["counters"], "samples": samples_taken(index.metadata)}


def history_of(found: FoundCheckpoint | None) -> LossHistory:
    """Return the losses that a run had had when it saved this checkpoint."""
    if found is None:
        return LossHistory()
    history = LossHistory(BestLoss.restored(found.index.metadata.get("best")))
    history.outliers.restore(found.index.metadata.get("recent"))
    return history

"""The model of a checkpoint that a run has saved, without the run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from models.hf import entries_of
from models.shape import ModelShape
from models.shapes import shape_from
from parallel.checkpoint import checkpoint
from parallel.checkpoint.index import Index
from parallel.config import Config, parse
from parallel.errors import CheckpointError
from parallel.layout.layout import Piece

MASTER = "master/"
"""The beginning of the names that master weights have in a checkpoint."""


def widest_dtype(config: Config) -> torch.dtype:
    """Return the dtype of the master weights, in which an export loses nothing."""
    return torch.float64 if config.train.precision == "fp64" else torch.float32


@contextmanager
def of_this_program(folder: Path) -> Iterator[None]:
    """Have an error of what a checkpoint's files say be a CheckpointError that names its folder."""
    try:
        yield
    except CheckpointError:  # it is a ValueError, and says itself what is wrong with which file
        raise
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"CHECKPOINT: {folder} is not a checkpoint of this program: {error}.") from error


@dataclass(frozen=True)
class SavedModel:
    """The model of a checkpoint: its index, the step that it was saved after, the config of its run, and its shape."""

    index: Index
    step: int
    config: Config
    shape: ModelShape

    @classmethod
    def of(cls, index: Index) -> "SavedModel":
        """Return the model of a checkpoint. Raises CheckpointError for one of another program."""
        folder, metadata = index.folder, index.metadata
        with of_this_program(folder):
            if "model" not in metadata and "format" in metadata:
                raise CheckpointError(
                    f"CHECKPOINT: {folder} was saved by a loop of your own (engine.save_checkpoint), and does not say"
                    " which model it has. Load it there, and call engine.save_pretrained."
                )
            # The layout of the run is left out: its schedule may be a file that has gone.
            kept = {name: section for name, section in metadata["config"].items() if name != "parallel"}
            config, shape = parse(kept, batches=False), shape_from(metadata["model"])
            return cls(index, int(metadata["step"]), config, shape)

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint."""
        return self.index.folder

    def tensors(self) -> Iterator[Piece]:
        """Yield the master weights, whole, one at a time, in the order of an export."""
        entries = entries_of(self.shape, widest_dtype(self.config))
        stored = [replace(entry, key=f"{MASTER}{entry.key}") for entry in entries]
        for piece in checkpoint.whole_tensors(self.index, stored):
            yield replace(piece, name=piece.name.removeprefix(MASTER))

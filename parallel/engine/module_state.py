"""The files of an engine of any module: directories that `from_pretrained` reads, and checkpoints."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from parallel.checkpoint import checkpoint
from parallel.checkpoint.hf_folder import write_folder
from parallel.checkpoint.shards import Entry, fail_together
from parallel.engine.adapters import save_adapters, save_merged
from parallel.engine.base import EngineBase
from parallel.layout.layout import Piece
from parallel.mesh.collectives import gather_objects
from parallel.modules.adapters import has_adapters
from parallel.modules.buffers import buffer_pieces
from parallel.modules.hf_configs import write_hf_configs


class ModuleState(EngineBase):
    """The part of a `ModuleEngine` that writes and reads files.

    The buffers of its module belong to its state.
    """

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None, merge: bool = False) -> None:
        """Write the weights as a Hugging Face directory, on every rank together.

        It has safetensors under the module's own names, a shared tensor once, and the module's configs. Their dtype is
        `dtype`, by default fp32, or fp64 where that is the engine's precision. Of a peft model the adapters are
        written, in peft's format; with `merge` the model of which they have become a part. Other files of the folder
        are kept. Raises CheckpointError on every rank where rank 0 cannot write, or where a tensor's dtype cannot be
        saved; ModelError for a `merge` without adapters.
        """
        wide = dtype or (torch.float64 if self.context.dtype == torch.float64 else torch.float32)
        if merge or has_adapters(self.module):
            save = save_merged if merge else save_adapters
            save(self.module, super().weights(), Path(folder), wide, self.mesh.world)
            return
        entries = [Entry(i.name, i.public_shape, wide) for chunk in self.chunks for i in chunk.infos]
        entries += [Entry(piece.name, piece.shape, piece.data.dtype) for piece in buffer_pieces(self.module)]
        entries.sort(key=lambda entry: -entry.dtype.itemsize)
        describe = partial(write_hf_configs, self.module, wide)
        write_folder(Path(folder), self.weights(), entries, axis=self.mesh.world, describe=describe)

    def save_checkpoint(self, folder: str | Path, extra: Mapping[str, Any] | None = None, *, keep: int = 2) -> Path:
        """Write weights, optimizer states and counters to folder/checkpoints/step_N, on every rank together.

        Returns that path. `extra`, of values for JSON, is saved too. Frozen parameters are not saved. Training can be
        resumed on any number of ranks and in any stage. The last `keep` checkpoints are kept. Raises CheckpointError.
        """
        target = checkpoint.step_folder(Path(folder), self.num_steps)
        own = self.optimizer.counters()
        steps = {k: v for part in gather_objects(own["steps"], self.mesh.world) for k, v in part.items()}
        metadata = dict(counters=self.counters(), **own | dict(steps=steps), extra=dict(extra or {}))
        checkpoint.save(target, self.state_pieces(owned=True), metadata=metadata, axis=self.mesh.world, keep=keep)
        return target

    def load_checkpoint(self, folder: str | Path) -> dict[str, Any]:
        """Resume from a checkpoint, or from the latest in a folder that was saved to, and return its `extra`.

        Raises CheckpointError, on every rank, for a checkpoint that is missing, damaged, or of another model.
        """
        found = checkpoint.find_checkpoint(str(folder), Path(folder), option="load_checkpoint")
        assert found is not None
        metadata = checkpoint.read_metadata(found)
        pieces = self.state_pieces()
        with fail_together(self.mesh.world):
            checkpoint.load(found, pieces)
        self.restore(metadata["counters"])
        self.optimizer.restore(self.num_updates, steps=metadata["steps"], rates=metadata.get("rates"))
        extra: dict[str, Any] = metadata["extra"]
        return extra

    def weights(self) -> list[Piece]:
        """Return the pieces that this rank owns of the weights, in the precision of the master weights.

        The first rank's include the buffers.
        """
        return super().weights() + (buffer_pieces(self.module) if self.mesh.rank == 0 else [])

    def state(self) -> dict[str, list[Piece]]:
        """Return all tensors that a step changes, as pieces by kind, the buffers among them."""
        return super().state() | {"buffer": buffer_pieces(self.module)}

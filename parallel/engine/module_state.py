"""What an engine of any module writes and reads: directories that `from_pretrained` reads, and checkpoints."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from parallel.checkpoint import checkpoint
from parallel.checkpoint.hf_folder import write_folder
from parallel.checkpoint.shards import Entry, fail_together
from parallel.engine.base import EngineBase
from parallel.layout.layout import Piece
from parallel.mesh.collectives import gather_objects
from parallel.modules import adapters as modules


class ModuleState(EngineBase):
    """The part of a `ModuleEngine` that deals with files. The buffers of its module belong to its state."""

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write the weights as a Hugging Face directory: safetensors under the module's own names, a shared one once,
        and the configs it has. In fp32, or fp64 where the engine's precision is that, unless `dtype` says otherwise.

        Raises CheckpointError on every rank where rank 0 cannot write.
        """
        wide = dtype or (torch.float64 if self.context.dtype == torch.float64 else torch.float32)
        entries = [Entry(i.name, i.public_shape, wide) for chunk in self.chunks for i in chunk.infos]
        entries += [Entry(piece.name, piece.shape, piece.data.dtype) for piece in modules.buffer_pieces(self.module)]
        entries.sort(key=lambda entry: -entry.dtype.itemsize)
        describe = partial(modules.write_configs, self.module, wide)
        write_folder(Path(folder), self.weights(), entries, axis=self.mesh.world, describe=describe)

    def save_checkpoint(self, folder: str | Path, extra: Mapping[str, Any] | None = None, *, keep: int = 2) -> Path:
        """Write weights, states and counters to folder/checkpoints/step_N; `extra`, ready for JSON, goes along.

        Frozen parameters are not saved. Any number of ranks and any stage can go on from it. Raises CheckpointError.
        """
        target = checkpoint.step_folder(Path(folder), self.num_steps)
        own = self.optimizer.counters()
        steps = {k: v for part in gather_objects(own["steps"], self.mesh.world) for k, v in part.items()}
        metadata = dict(counters=self.counters(), **own | dict(steps=steps), extra=dict(extra or {}))
        checkpoint.save(target, self.state_pieces(owned=True), metadata=metadata, axis=self.mesh.world, keep=keep)
        return target

    def load_checkpoint(self, folder: str | Path) -> dict[str, Any]:
        """Go on from a checkpoint, or the latest of a folder that was saved to; returns the `extra` that it has.

        Raises CheckpointError for one that is missing, damaged, or of another model.
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
        """The pieces that this rank owns of the weights, in master precision, and on the first rank the buffers."""
        return super().weights() + (modules.buffer_pieces(self.module) if self.mesh.rank == 0 else [])

    def state(self) -> dict[str, list[Piece]]:
        return super().state() | {"buffer": modules.buffer_pieces(self.module)}

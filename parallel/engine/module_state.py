"""The state of an engine of any module, and the directories that `from_pretrained` reads."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from parallel.checkpoint.hf_folder import write_folder
from parallel.checkpoint.tensor_file import Entry
from parallel.engine.adapters import save_adapters, save_merged
from parallel.engine.state import EngineState
from parallel.layout.layout import Piece
from parallel.modules.adapters import has_adapters
from parallel.modules.buffers import buffer_pieces
from parallel.modules.hf_configs import write_hf_configs


class ModuleState(EngineState):
    """The part of a `ModuleEngine` that writes exports, and knows what belongs to the state of any module.

    The buffers of its module belong to its state.
    """

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None, merge: bool = False) -> None:
        """Write the weights as a Hugging Face directory, on every rank together.

        It has safetensors under the module's own names, a shared tensor once, and the module's configs. Their dtype is
        `dtype`, by default fp32, or fp64 where that is the engine's precision. Of a peft model the adapters are
        written, in peft's format; with `merge` the model of which they have become a part. Other files of the folder
        are kept. Raises CheckpointError on every rank where rank 0 cannot write, or where a tensor's dtype cannot be
        saved; ModelError for a `merge` without adapters; NonFiniteError, before anything is written, where a weight is
        not finite.
        """
        self.agree_on("an export")  # before the collectives of `weights`
        self.writes.take_if_any()
        self.check_finite("It is not exported.")
        wide = dtype or (torch.float64 if self.context.dtype == torch.float64 else torch.float32)
        if merge or has_adapters(self.module):
            save = save_merged if merge else save_adapters
            save(self.module, super().weights(), Path(folder), wide, self.mesh.world)
            return
        sources = [source for chunk in self.chunks for info in chunk.infos for source in info.sources]
        entries = [Entry(source.name, source.shape, wide) for source in sources]
        entries += [Entry(piece.name, piece.shape, piece.data.dtype) for piece in buffer_pieces(self.module)]
        entries.sort(key=lambda entry: -entry.dtype.itemsize)
        describe = partial(write_hf_configs, self.module, wide)
        write_folder(Path(folder), self.weights(), entries, axis=self.mesh.world, describe=describe)

    def weights(self) -> list[Piece]:
        """Return the pieces that this rank owns of the weights, in the precision of the master weights.

        The first rank's include the buffers.
        """
        return super().weights() + (buffer_pieces(self.module) if self.mesh.rank == 0 else [])

    def _buffers_to_check(self) -> list[Piece]:
        """Return the buffers, in which NaN alone counts: masks have infinities."""
        floating = [piece for piece in buffer_pieces(self.module) if piece.data.is_floating_point()]
        return [replace(x, data=x.data.nan_to_num(torch.nan, posinf=0.0, neginf=0.0)) for x in floating]

    def state(self) -> dict[str, list[Piece]]:
        """Return all tensors that a step changes, as pieces by kind, the buffers among them."""
        return super().state() | {"buffer": buffer_pieces(self.module)}

"""The room on the host for the copy from which a checkpoint is written in the background, counted before a run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from parallel.chunk.spec import ChunkSpec
from parallel.config import ZeroConfig
from parallel.errors import size_text
from parallel.placement.policy import ChunkBytes
from parallel.storage.host import available

NO_ROOM = "an update of a chunk waits until the chunk is written"


@dataclass(frozen=True)
class SaveRoom:
    """The bytes of a rank's copy, and those that it may take: `zero.host_memory` or, without it, this rank's share of
    what the host has; less what chunks take there.
    """

    needed: int
    room: int

    @property
    def is_enough(self) -> bool:
        """True if the copy fits. Else states are written from where they are, and the next update waits for that."""
        return self.needed <= self.room

    def describe(self) -> str:
        """Return how checkpoints are saved, for a user."""
        if self.is_enough:
            return f"checkpoints: copied to {size_text(self.needed)} of host memory, written in the background"
        return (
            f"checkpoints: written behind: the host has no room for a copy of {size_text(self.needed)}"
            f" ({size_text(max(0, self.room))} is left), and {NO_ROOM}"
        )


def save_room(
    specs: Sequence[ChunkSpec],
    sizes: Sequence[ChunkBytes],
    zero: ZeroConfig,
    *,
    num_ranks: int,
    on_host: int,
    device: torch.device,
) -> SaveRoom:
    """Return the room for the states of these chunks on a host that `num_ranks` ranks share, before they are made.

    `on_host` are the bytes of the chunks that go to the host. Where the device is a CPU, all of them are in its memory.
    """
    needed = sum(size.states or size.parameters for spec, size in zip(specs, sizes, strict=True) if spec.is_owner)
    if zero.host_memory is not None:
        return SaveRoom(needed, int(zero.host_memory) - on_host)
    if device.type != "cuda":
        on_host = sum(size.parameters + size.gradient + size.states for size in sizes)
    return SaveRoom(needed, available() // num_ranks - on_host)

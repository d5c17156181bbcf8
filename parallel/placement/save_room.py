"""The room on the host for the copy from which a checkpoint is written in the background, counted before a run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from parallel.chunk.spec import ChunkSpec
from parallel.config import ZeroConfig
from parallel.errors import size_text
from parallel.placement.policy import ChunkBytes, host_bytes, max_states_on_host
from parallel.placement.room import host_room
from parallel.storage.host import available


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
            f"checkpoints: written behind, since the host has no room for a copy of {size_text(self.needed)}:"
            " updates wait for writes"
        )


def tightest(rooms: Sequence[SaveRoom]) -> SaveRoom:
    """Return the room, of several ranks', that is the nearest to be too little."""
    return min(rooms, key=lambda room: room.room - room.needed)


def foreseen_save_room(
    specs: Sequence[ChunkSpec], sizes: Sequence[ChunkBytes], zero: ZeroConfig, *, num_ranks: int, device: torch.device
) -> SaveRoom:
    """Return what `save_room` will return in a run, with nothing started."""
    on_host = 0
    if zero.tensor_placement_policy != "cuda":
        num_host_states = max_states_on_host(sizes, host_room(zero, specs, num_ranks)) or 0
        on_host = host_bytes(sizes, 0, 0, num_host_states)
    return save_room(specs, sizes, zero, num_ranks=num_ranks, on_host=on_host, device=device)


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

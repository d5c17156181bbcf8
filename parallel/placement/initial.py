"""The initial placement of chunks, decided before any of them is made: a model may be larger than the host."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch

from parallel.chunk.spec import ChunkSpec, ChunkStorage
from parallel.config import Config
from parallel.mesh.mesh import Axis
from parallel.placement.agreement import agreed_minimum, refuse_together
from parallel.placement.policy import ChunkBytes, HostRoom, host_bytes, max_states_on_host
from parallel.placement.room import UNLIMITED, host_room
from parallel.placement.save_room import SaveRoom, save_room
from parallel.placement.shortage import disk_shortage, explain_host_shortage, folder_problem, host_shortage
from parallel.storage.disk import Disk
from parallel.storage.transfer import Placement, Tier

ON_HOST = Placement(Tier.HOST, Tier.HOST)
ON_DISK = Placement(Tier.HOST, Tier.DISK)


@dataclass(frozen=True)
class InitialPlacement:
    """The specification, storage and bytes of each chunk, the room on the host that the storage was chosen for, and
    what it leaves for the copies of checkpoints.
    """

    specs: Sequence[ChunkSpec]
    storages: list[ChunkStorage]
    sizes: list[ChunkBytes]
    room: HostRoom
    save_room: SaveRoom

    def explain_host_shortage(self) -> AbstractContextManager[None]:
        """Return a block in which a MemoryError of the host becomes a RoomError that says what would help."""
        return explain_host_shortage(self.sizes, self.room)


def initial_placement(
    specs: Sequence[ChunkSpec],
    sizes: list[ChunkBytes],
    config: Config,
    *,
    world: Axis,
    num_ranks_on_host: int,
    device: torch.device,
) -> InitialPlacement:
    """Return where the chunks are at first, by `zero.tensor_placement_policy`.

    With "cuda" everything is on the device. With "cpu", and with "auto" until a step has been profiled, everything is
    offloaded: parameters to the host, and the states of as many chunks as it has room for, the others to the disk.

    Raises ConfigError, on every rank, where one has too little room.
    """
    zero = config.zero
    left = partial(save_room, specs, sizes, zero, num_ranks=num_ranks_on_host, device=device)
    if zero.tensor_placement_policy == "cuda":
        return InitialPlacement(specs, [ChunkStorage() for _ in sizes], sizes, HostRoom(UNLIMITED), left(on_host=0))
    room = host_room(zero, specs, num_ranks_on_host)
    num_host_states = max_states_on_host(sizes, room)
    shortage = host_shortage(sizes, room, config) if num_host_states is None else ""
    refuse_together(folder_problem(zero) or shortage, world)
    num_host_states = agreed_minimum(num_host_states or 0, sizes, world)
    refuse_together(disk_shortage(sizes[num_host_states:], zero, world), world)
    disk = Disk(zero.nvme_dir, world.rank, device) if zero.nvme_dir is not None else None
    placements = [ON_HOST if i < num_host_states else ON_DISK for i in range(len(sizes))]
    storages = [ChunkStorage(placement, disk) for placement in placements]
    return InitialPlacement(specs, storages, sizes, room, left(on_host=host_bytes(sizes, 0, 0, num_host_states)))

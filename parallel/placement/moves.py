"""Moving chunks between tiers, together with their optimizer states."""

from collections.abc import Sequence
from typing import Protocol

from parallel.chunk.chunk import Chunk
from parallel.chunk.spec import ChunkStorage
from parallel.placement.policy import PlacementPlan
from parallel.storage.transfer import Placement, Tier


class MovingOptimizer(Protocol):
    """An optimizer whose states can be moved between two steps, and which updates a share of them on the host.

    host_share    the host's share of the elements that either side may update
    first_share   what it is in a profiled step, which times all sides
    """

    host_share: float
    first_share: float

    def move(self, chunk: Chunk, placement: Placement) -> None:
        """Move the parameters, master weights and moments of a chunk."""

    def state_bytes(self, chunk: Chunk) -> int:
        """Return the bytes of a chunk's master weights and moments."""

    def balance(self) -> float:
        """Return the host's share with which neither side waits for the other where the chunks are now, at the speeds
        of the last update.
        """

    def update_seconds(self) -> tuple[float, float]:
        """Return the seconds of the last update, and those of the next one where the chunks are now, at the same
        speeds.
        """


def move_by_plan(chunks: Sequence[Chunk], optimizer: MovingOptimizer, plan: PlacementPlan) -> None:
    """Move chunks to where a plan wants them. Parameters come first: what leaves the host makes room for what comes."""
    for i, chunk in enumerate(chunks):
        parameters = Tier.DEVICE if i < plan.num_device_parameters else Tier.HOST
        optimizer.move(chunk, Placement(parameters, chunk.placement.states))
    for i, chunk in enumerate(chunks):
        offloaded = Tier.HOST if i < plan.num_host_states else Tier.DISK
        states = Tier.DEVICE if i < plan.num_device_states else offloaded
        optimizer.move(chunk, Placement(chunk.placement.parameters, states))


def move_back(chunks: Sequence[Chunk], optimizer: MovingOptimizer, storages: Sequence[ChunkStorage]) -> None:
    """Move chunks to where they were at first. States come first: some of them leave the host for the disk."""
    moves = [*zip(chunks, storages, strict=True)][::-1]
    for chunk, storage in moves:
        optimizer.move(chunk, Placement(chunk.placement.parameters, storage.placement.states))
    for chunk, storage in moves:
        optimizer.move(chunk, storage.placement)

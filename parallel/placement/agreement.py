"""The decisions about placement that all ranks take together, by collectives over the world."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from parallel.chunk.chunk import Chunk
from parallel.config import ZeroConfig
from parallel.errors import ConfigError
from parallel.mesh.collectives import all_reduce, gather_objects
from parallel.mesh.mesh import Axis
from parallel.placement.policy import ChunkBytes
from parallel.placement.room import gathered_at_once
from parallel.placement.shortage import device_shortage


@dataclass(frozen=True)
class Proposal:
    """The placement that a rank would choose: it offloads the states, and the parameters, of so many of its last
    chunks.
    """

    offloaded_states: int
    offloaded_parameters: int

    def on_device(self, num_chunks: int) -> tuple[int, int]:
        """Return how many of a rank's first chunks have their states, and their parameters, on the device."""
        return max(0, num_chunks - self.offloaded_states), max(0, num_chunks - self.offloaded_parameters)


class RankAgreement:
    """The decisions about placement that are the same on all ranks.

    Replicas of a master weight must all be updated on the same side, since host and device round differently. Pipeline
    stages have other chunks, and ranks may have other devices; so they agree on numbers of chunks that suit each.

    `key` is what a plan depends on: a saved plan is used again only where it is the same.
    """

    def __init__(self, chunks: Sequence[Chunk], zero: ZeroConfig, budget: int, world: Axis) -> None:
        """Raises ConfigError, on every rank, where the device of one cannot hold the parameters gathered at once."""
        self.world = world
        own = gathered_at_once(chunks), budget, len(chunks), sum(chunk.size for chunk in chunks)
        ranks = gather_objects(own, world)
        if hopeless := [(needed, room) for needed, room, *_ in ranks if needed > room]:
            raise ConfigError(device_shortage(*max(hopeless)))
        self.key: dict[str, Any] = dict(
            chunks=[list(sizes) for _, _, *sizes in ranks],
            stage=zero.stage,
            policy=zero.tensor_placement_policy,
            budget=budget,
            margin=zero.gpu_margin_mem_ratio,
            ranks=world.size,
        )

    def is_true_on_any(self, claim: bool) -> bool:
        return bool(all_reduce(torch.tensor(claim, dtype=torch.int64), self.world))

    def is_true_on_all(self, claim: bool) -> bool:
        return all(gather_objects(claim, self.world))

    def agree(self, own: Proposal) -> Proposal:
        """Return a proposal that suits every rank: each offloads as many chunks as any rank needs to."""
        proposals: list[Proposal] = gather_objects(own, self.world)
        return Proposal(
            max(proposal.offloaded_states for proposal in proposals),
            max(proposal.offloaded_parameters for proposal in proposals),
        )

    def least_share(self, own: float) -> float:
        """Return the least share of an update that any rank would leave to its host: replicas have one share."""
        shares: list[float] = gather_objects(own, self.world)
        return min(shares)


def agreed_minimum(num_host_states: int, sizes: Sequence[ChunkBytes], world: Axis) -> int:
    """Return the minimum over the ranks that have the same chunks: they update copies of the same weights, in one way.

    All ranks call it together.
    """
    own = [size.states for size in sizes]
    found: list[int] = [number for states, number in gather_objects((own, num_host_states), world) if states == own]
    return min(found)


def refuse_together(problem: str, world: Axis) -> None:
    """Raise ConfigError on every rank if one of them has a problem. All ranks call it together."""
    if problems := [found for found in gather_objects(problem, world) if found]:
        raise ConfigError(*dict.fromkeys(problems))

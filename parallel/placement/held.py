"""The tensors that a rank holds between two operations of a step, by the names of their layers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from parallel.chunk.chunk import Chunk
from parallel.storage.transfer import Tier


@dataclass(frozen=True)
class HeldTensors:
    """The tensors of one kind that belong to one layer: where they are, and their bytes."""

    kind: str
    layer: str
    tier: Tier
    num_bytes: int


def held_tensors(chunks: Sequence[Chunk], state_bytes: Callable[[Chunk], int]) -> list[HeldTensors]:
    """Return what the chunks hold now, the largest first. `state_bytes` returns the bytes of a chunk's master weights
    and moments, as far as they exist.
    """
    totals: dict[tuple[str, str, Tier], int] = {}
    for chunk in chunks:
        for kind, tier, num_bytes in _of_chunk(chunk, state_bytes(chunk)):
            key = kind, chunk.infos[0].unit or chunk.infos[0].name, tier
            totals[key] = totals.get(key, 0) + num_bytes
    found = [HeldTensors(*key, num_bytes) for key, num_bytes in totals.items() if num_bytes]
    return sorted(found, key=lambda held: -held.num_bytes)


def _of_chunk(chunk: Chunk, state_bytes: int) -> Iterator[tuple[str, Tier, int]]:
    """Yield the kind, the tier and the bytes of each tensor of a chunk; memory that two of them share counts once."""
    yield "parameters", Tier.DEVICE, _bytes(chunk.parameters.whole)
    if chunk.is_gathered_on_demand:
        yield "parameters", chunk.parameters.tier, _bytes(chunk.parameters.own)
    if not chunk.is_frozen:
        if not chunk.sharing.masters_are_slice:
            yield "master weights", chunk.states.tier, _bytes(chunk.master)
        yield "moments", chunk.states.tier, max(0, state_bytes - chunk.master.nbytes)
    gradient = chunk.gradient
    if gradient.accumulator.buffer is not None:
        yield "gradients", Tier.DEVICE, _bytes(gradient.accumulator.buffer)
    if gradient.total is not None and not gradient.is_in_parameters and gradient.total is not gradient.host_buffer:
        yield "gradients", gradient.tier, _bytes(gradient.total)
    if gradient.host_buffer is not None:
        yield "gradients", Tier.HOST, _bytes(gradient.host_buffer)


def _bytes(x: Tensor) -> int:
    return min(x.nbytes, x.untyped_storage().nbytes())

"""The room that chunks have on the device and on the host, and what the device must hold in any case."""

from collections.abc import Sequence

import torch

from parallel.chunk.chunk import Chunk
from parallel.chunk.spec import Outline
from parallel.config import ZeroConfig
from parallel.placement.policy import HostRoom
from parallel.storage.host import available

UNLIMITED = 2**62  # bytes: a host that acts as the device has no limit of its own
LAYERS_AT_ONCE = 3  # whose parameters are on the device together: two layers' and the embedding's


def device_budget(zero: ZeroConfig, device: torch.device) -> int:
    """Return the bytes of device memory that a rank may use."""
    if zero.device_memory is not None:
        return int(zero.device_memory)
    if device.type != "cuda":
        return UNLIMITED
    return int(torch.cuda.get_device_properties(device).total_memory)


def host_room(zero: ZeroConfig, outlines: Sequence[Outline], num_ranks: int) -> HostRoom:
    """Return the room on the host for the chunks of this rank, one of `num_ranks` that share the host.

    What its parameters take there already counts as room, since they become a part of the chunks.
    """
    has_disk = zero.nvme_dir is not None
    if zero.host_memory is not None:
        return HostRoom(int(zero.host_memory), has_disk)
    parameters = (info.parameter for outline in outlines for info in outline.infos)
    held = sum(p.untyped_storage().nbytes() for p in parameters if p.device.type == "cpu")
    return HostRoom(int(available() // num_ranks + held), has_disk)


def gathered_at_once(chunks: Sequence[Chunk]) -> int:
    """Return the bytes of gathered parameters that the device must hold together, however much is offloaded."""
    layers: dict[str, int] = {}
    for chunk in chunks:
        if chunk.is_gathered_on_demand:
            layers[chunk.infos[0].unit] = layers.get(chunk.infos[0].unit, 0) + chunk.whole_bytes
    return sum(sorted(layers.values())[-LAYERS_AT_ONCE:])

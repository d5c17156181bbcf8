"""Where chunks are at home when a run begins, told before any of them is made: a model may be larger than the host."""

import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from parallel.chunk.precision import gradient_dtype, moment_dtype, state_size
from parallel.chunk.spec import ChunkSpec, ChunkStorage
from parallel.config import Config, OptimizerConfig, ZeroConfig
from parallel.errors import ConfigError, RoomError, either, size_text
from parallel.mesh.collectives import gather_objects
from parallel.mesh.mesh import Axis
from parallel.optim import streaming
from parallel.placement.policy import ChunkBytes, HostRoom, host_of, max_states_on_host
from parallel.storage import disk
from parallel.storage.disk import PAGE, Disk, check_folder, in_pages
from parallel.storage.host import available
from parallel.storage.transfer import Placement, Tier

NUM_STATES = 3  # masters and two moments
ON_HOST = Placement(Tier.HOST, Tier.HOST)
ON_DISK = Placement(Tier.HOST, Tier.DISK)


@dataclass(frozen=True)
class InitialPlacement:
    """Of each chunk its home and its bytes, and the room on the host that they were chosen for."""

    specs: Sequence[ChunkSpec]
    storages: list[ChunkStorage]
    sizes: list[ChunkBytes]
    room: HostRoom


def start(
    specs: Sequence[ChunkSpec],
    sizes: list[ChunkBytes],
    config: Config,
    *,
    world: Axis,
    peers: int,
    device: torch.device,
) -> InitialPlacement:
    """Everything on the device or, with `cpu` and with `auto`, which looks on for a step before it brings anything
    there, on the host; of the states those of as many chunks as fit beside the rest, and the others on the disk.

    `peers`: how many ranks share this host. Raises ConfigError, on every rank, where one has too little room.
    """
    zero = config.zero
    if zero.tensor_placement_policy == "cuda":
        return InitialPlacement(specs, [ChunkStorage() for _ in sizes], sizes, HostRoom(2**62))
    room = HostRoom(_allowed(zero, specs, peers), has_disk=zero.nvme_dir is not None)
    num_host_states = max_states_on_host(sizes, room)
    refuse_together(folder_problem(zero) or (shortage(sizes, room, config) if num_host_states is None else ""), world)
    num_host_states = agreed_minimum(num_host_states or 0, sizes, world)
    refuse_together(_disk_problem(sizes[num_host_states:], zero, world), world)
    disk_of_rank = Disk(zero.nvme_dir, world.rank, device) if zero.nvme_dir is not None else None
    return InitialPlacement(
        specs,
        [ChunkStorage(ON_HOST if i < num_host_states else ON_DISK, disk_of_rank) for i in range(len(sizes))],
        sizes,
        room,
    )


def bytes_of(
    spec: ChunkSpec, num_microbatches: int, optimizer: OptimizerConfig, *, is_torchs: bool = False
) -> ChunkBytes:
    """Of a chunk to be, in steps of so many microbatches; `is_torchs`: the optimizer, which takes all gradients at once
    in the masters' precision, and states on a disk as they are.
    """
    count, narrow, wide = spec.num_own, spec.dtype.itemsize, spec.master_dtype.itemsize
    whole = spec.size * narrow
    if spec.is_frozen:
        return ChunkBytes(whole, 0, 0, own=count * narrow)
    dtype = gradient_dtype(spec.dtype, spec.axes, num_microbatches)
    widths = wide, *[moment_dtype(spec.master_dtype, optimizer).itemsize] * 2
    return ChunkBytes(
        whole,
        count * dtype.itemsize,
        count * state_size(spec.master_dtype, optimizer),
        own=count * narrow,
        widened=count * wide if is_torchs and dtype.itemsize < wide else 0,
        buffers=0 if is_torchs else disk.NUM_SLOTS * sum(in_pages(min(count, streaming.PART) * w) for w in widths),
        is_wide=spec.is_wide,
        lends=num_microbatches == 1 and dtype == spec.dtype,
    )


def shortage(sizes: Sequence[ChunkBytes], room: HostRoom, config: Config) -> str:
    """What is wrong with a host that has too little room."""
    own, gradients, states = (sum(x) for x in zip(*((c.own, c.gradient, c.states) for c in sizes), strict=True))
    count = len(sizes)  # of a model of few chunks the states may be smaller than what they would go through
    fewest = min((0, count) if room.has_disk else (count,), key=lambda k: host_of(sizes, 0, 0, k))
    least = host_of(sizes, 0, 0, fewest)
    far = f" on the disk, {size_text(max(c.buffers for c in sizes))} for their way" if fewest < count else ""
    source = "available" if config.zero.host_memory is None else "zero.host_memory"
    cures = [] if room.has_disk else ["zero.nvme_dir (a folder on a fast disk, for the optimizer states)"]
    cures += [] if config.optimizer.state_dtype == "bf16" else ["optimizer.state_dtype='bf16'"]
    cures += ["zero.stage=3 on more ranks", "parallel.tensor", "parallel.pipeline"]
    return (
        f"zero.host_memory: a rank needs {size_text(least)} of its host (parameters {size_text(own)}, gradients"
        f" {size_text(gradients)}, optimizer states {size_text(states)}{far}), and"
        f" {size_text(room.budget)} is {source}. Give it more, or try {either(cures)}."
    )


@contextmanager
def explain_host_shortage(start: InitialPlacement) -> Iterator[None]:
    """A user whose host has less room than it seemed is told so in a RoomError, with what would help."""
    try:
        yield
    except MemoryError as error:
        whole = host_of(start.sizes, 0, 0, len(start.sizes))
        raise RoomError(
            "zero.host_memory: the host has no room for this rank's chunks, which may have"
            f" {size_text(start.room.budget)} there and with all states need {size_text(whole)}: {error} Try a smaller"
            " zero.host_memory and a zero.nvme_dir, zero.stage=3 on more ranks, or a higher limit of locked memory"
            " (ulimit -l)."
        ) from error


def folder_problem(zero: ZeroConfig) -> str:
    """What is wrong with `nvme_dir`, but for its room; it is made where it is missing."""
    try:
        if zero.nvme_dir is not None:
            check_folder(zero.nvme_dir)
    except ConfigError as error:
        return str(error)
    return ""


def refuse_together(problem: str, world: Axis) -> None:
    """Raise ConfigError on every rank if one has a problem."""
    if problems := [found for found in gather_objects(problem, world) if found]:
        raise ConfigError(*dict.fromkeys(problems))


def agreed_minimum(num_host_states: int, sizes: Sequence[ChunkBytes], world: Axis) -> int:
    """The same on ranks that have the same chunks, the least of them: copies of a weight are updated in one way."""
    own = [size.states for size in sizes]
    found: list[int] = [number for states, number in gather_objects((own, num_host_states), world) if states == own]
    return min(found)


def _allowed(zero: ZeroConfig, specs: Sequence[ChunkSpec], peers: int) -> int:
    """Bytes of the host for the chunks of this rank. What its parameters take there already becomes a part of them."""
    if zero.host_memory is not None:
        return int(zero.host_memory)
    parameters = (info.parameter for spec in specs for info in spec.infos)
    held = sum(p.untyped_storage().nbytes() for p in parameters if p.device.type == "cpu")
    return int(available() // peers + held)


def _disk_problem(sizes: Sequence[ChunkBytes], zero: ZeroConfig, world: Axis) -> str:
    """Whether the files of all ranks that share a disk fit there."""
    if zero.nvme_dir is None:
        return ""
    mine = sum(size.states + NUM_STATES * PAGE for size in sizes if size.states)
    place = socket.gethostname(), os.stat(zero.nvme_dir).st_dev
    needs = [need for where, need in gather_objects((place, mine), world) if where == place]
    free = shutil.disk_usage(zero.nvme_dir).free
    if sum(needs) <= free:
        return ""
    return (
        f"zero.nvme_dir: {zero.nvme_dir} has {size_text(free)} free, and the optimizer states of its"
        f" {len(needs)} ranks need {size_text(sum(needs))}. Try a larger disk, or a larger zero.host_memory."
    )

"""The messages for a device, a host or a disk that has too little room: numbers, and what would help."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from parallel.config import Config, ZeroConfig
from parallel.errors import ConfigError, DiskFullError, NoRoomError, RoomError, either, first_line, size_text
from parallel.mesh.collectives import gather_objects
from parallel.mesh.mesh import Axis
from parallel.placement.policy import ChunkBytes, HostRoom, host_bytes
from parallel.storage.no_room import asked_for, disk_problem, memory_without_room, no_room
from parallel.storage.state_file import PAGE, make_folder
from parallel.watch.process import host_name, rank_here

NUM_STATES = 3  # of a chunk: master weights and two moments, a file each


def device_shortage(needed: int, budget: int) -> str:
    """Return what is wrong with a device that cannot hold the parameters which are gathered at once."""
    return (
        f"zero.device_memory: {size_text(budget)} cannot hold {size_text(needed)}, the parameters that are on the"
        " device at the same time even if everything is offloaded: those of the embedding and of two layers. Give it"
        " more, or split the model by parallel.tensor or parallel.pipeline."
    )


def host_shortage(sizes: Sequence[ChunkBytes], room: HostRoom, config: Config) -> str:
    """Return what is wrong with a host that has too little room for these chunks."""
    totals = ((chunk.host_parameters, chunk.gradient, chunk.states) for chunk in sizes)
    parameters, gradients, states = (sum(kind) for kind in zip(*totals, strict=True))
    count = len(sizes)  # in a model of few chunks the states may be smaller than the slots to a disk
    num_host_states = min((0, count) if room.has_disk else (count,), key=lambda k: host_bytes(sizes, 0, 0, k))
    least = host_bytes(sizes, 0, 0, num_host_states)
    slots = size_text(max(chunk.slots for chunk in sizes))
    on_disk = f" on the disk, {slots} of buffers to read and write them" if num_host_states < count else ""
    source = "available" if config.zero.host_memory is None else "zero.host_memory"
    cures = [] if room.has_disk else ["zero.nvme_dir (a folder on a fast disk, for the optimizer states)"]
    cures += [] if config.optimizer.state_dtype == "bf16" else ["optimizer.state_dtype='bf16'"]
    cures += ["zero.stage=3 on more ranks", "parallel.tensor", "parallel.pipeline"]
    return (
        f"zero.host_memory: a rank needs {size_text(least)} of its host (parameters {size_text(parameters)}, gradients"
        f" {size_text(gradients)}, optimizer states {size_text(states)}{on_disk}), and"
        f" {size_text(room.budget)} is {source}. Give it more, or try {either(cures)}."
    )


def folder_problem(zero: ZeroConfig) -> str:
    """Return what is wrong with the folder `nvme_dir`, its room aside, or an empty string. Make it if it is missing."""
    try:
        if zero.nvme_dir is not None:
            make_folder(zero.nvme_dir)
    except ConfigError as error:
        return str(error)
    return ""


def disk_shortage(sizes: Sequence[ChunkBytes], zero: ZeroConfig, world: Axis) -> str:
    """Return what is wrong if the state files of all ranks that share a disk do not fit there, or an empty string.

    `sizes` are those of the chunks whose states are to be on the disk. All ranks call it together.
    """
    if zero.nvme_dir is None:
        return ""
    own = sum(size.states + NUM_STATES * PAGE for size in sizes if size.states)
    disk = host_name(), os.stat(zero.nvme_dir).st_dev
    needs = [needed for other, needed in gather_objects((disk, own), world) if other == disk]
    free = shutil.disk_usage(zero.nvme_dir).free
    if sum(needs) <= free:
        return ""
    return (
        f"zero.nvme_dir: {zero.nvme_dir} has {size_text(free)} free, and the optimizer states of its"
        f" {len(needs)} ranks need {size_text(sum(needs))}. Try a larger disk, or a larger zero.host_memory."
    )


@contextmanager
def explain_host_shortage(sizes: Sequence[ChunkBytes], room: HostRoom) -> Iterator[None]:
    """Turn a MemoryError of the host in the block into a RoomError that says what would help."""
    try:
        yield
    except MemoryError as error:
        whole = host_bytes(sizes, 0, 0, len(sizes))
        raise RoomError(
            "zero.host_memory: the host has no room for this rank's chunks, which may take"
            f" {size_text(room.budget)} there and need {size_text(whole)} with all states: {error} Try a smaller"
            " zero.host_memory and a zero.nvme_dir, zero.stage=3 on more ranks, or a higher limit of locked memory"
            " (ulimit -l)."
        ) from error


@contextmanager
def refusing_without_room(rank: int, action: str) -> Iterator[None]:
    """Raise RoomError where a memory or a disk has no room in the block, before the first step.

    It may be of this rank alone; a DiskFullError, which every rank has, becomes a ConfigError. `action` names what the
    block does, such as "reading the checkpoint".
    """
    try:
        yield
    except DiskFullError as error:
        raise ConfigError(str(error)) from error
    except NoRoomError as error:
        raise RoomError(str(error)) from error
    except (RuntimeError, MemoryError, OSError) as error:
        who, memory = rank_here(rank), memory_without_room(error)
        if memory is not None:
            words = first_line(error)
            asked = f"{size_text(count)} more were asked for" if (count := asked_for(error)) else words
            raise RoomError(
                f"{who}: no room in the memory of the {memory.value} at {action}: {asked}. Try zero.stage=3,"
                " parallel.tensor or parallel.pipeline on more ranks, or fewer programs beside this one."
            ) from error
        if isinstance(error, OSError) and no_room(error):
            raise RoomError(f"{who}: {action}: {disk_problem(error)}") from error
        raise

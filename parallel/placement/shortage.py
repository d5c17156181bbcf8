"""The messages for a device, a host or a disk that has too little room: numbers, and what would help."""

import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from parallel.chunk.chunk import Chunk
from parallel.config import Config, ZeroConfig
from parallel.errors import ConfigError, RoomError, either, size_text
from parallel.mesh.collectives import gather_objects
from parallel.mesh.mesh import Axis
from parallel.placement.policy import ChunkBytes, HostRoom, host_bytes
from parallel.storage.state_file import PAGE, check_folder
from parallel.storage.transfer import Tier

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
            check_folder(zero.nvme_dir)
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
    disk = socket.gethostname(), os.stat(zero.nvme_dir).st_dev
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
def explain_device_shortage(chunks: Sequence[Chunk], budget: int) -> Iterator[None]:
    """Turn an OutOfMemoryError of the device in the block into a RoomError that says what would help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        is_offloaded = not any(Tier.DEVICE in (c.placement.parameters, c.placement.states) for c in chunks)
        more = "" if is_offloaded else " Or try zero.tensor_placement_policy='auto', which offloads what it can."
        raise RoomError(
            f"train.micro_batch_size: a step does not fit in zero.device_memory={size_text(budget)}:"
            f" {str(error).splitlines()[0]} Try a smaller micro_batch_size, or"
            f" activation_checkpointing='full' or 'offload'.{more}"
        ) from error

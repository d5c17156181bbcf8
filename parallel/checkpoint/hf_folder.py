"""Directories in Hugging Face's format, of a model that lies in pieces on many ranks."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint.shards import DTYPE_NAMES, Entry, adding, covered_once, write, write_json
from parallel.errors import CheckpointError
from parallel.layout.layout import Box, Piece, slices
from parallel.mesh.collectives import gather_objects, receive, send
from parallel.mesh.mesh import Axis

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5}\.safetensors|\.safetensors(\.index\.json)?)")
MAX_SHARD_BYTES = 5 * 10**9


def write_folder(
    folder: Path, pieces: Iterable[Piece], entries: Sequence[Entry], *, axis: Axis, describe: Callable[[Path], None]
) -> None:
    """Write the tensors that `entries` describe, and beside them what `describe` writes on rank 0.

    `pieces` are those this rank owns: each element of each tensor is owned by one rank of the axis. They go to rank 0
    in the order of the entries, a tensor at a time. Other files of the folder stay. If it cannot write, every rank
    raises a CheckpointError, and what was there is as it was.
    """
    for entry in entries:  # before a rank waits for another
        if entry.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{entry.key}: it is {entry.dtype}, which safetensors cannot hold.")
    order = {entry.key: place for place, entry in enumerate(entries)}
    owned = sorted(pieces, key=lambda piece: order[piece.name])
    owners = _owners(gather_objects([(piece.name, piece.box) for piece in owned], axis), entries)
    with adding(folder, WEIGHTS, axis) as temporary:
        if axis.rank > 0:
            for piece in owned:
                send(piece.data.to("cpu", entries[order[piece.name]].dtype), axis, to=0)
        else:
            tensors = _assemble(entries, owners, owned, axis)
            try:
                _write_weights(temporary, entries, tensors)
                describe(temporary)
            finally:  # whatever went wrong here, the others send, and must be heard
                for _ in tensors:
                    pass


Owners = dict[str, list[tuple[int, Box]]]
"""For each tensor the rank that owns a box of it, and the box, in the order in which they are sent."""


def _owners(boxes_of_ranks: list[list[tuple[str, Box]]], entries: Sequence[Entry]) -> Owners:
    owners: Owners = {entry.key: [] for entry in entries}
    for rank, boxes in enumerate(boxes_of_ranks):
        for name, box in boxes:
            owners[name].append((rank, box))
    for entry in entries:
        own = owners[entry.key]
        assert covered_once(entry.shape, [box for _, box in own]), f"{entry.key} is not owned once: {own}"
    return owners


def _assemble(entries: Sequence[Entry], owners: Owners, owned: Sequence[Piece], axis: Axis) -> Iterator[Tensor]:
    """Each tensor, whole, on rank 0: its own pieces, and those that the others send."""
    own = iter(owned)
    for entry in entries:
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for rank, box in owners[entry.key]:
            here = whole[slices(box)]
            here.copy_(next(own).data if rank == 0 else receive(here, axis, rank))
        yield whole


def _write_weights(folder: Path, entries: Sequence[Entry], tensors: Iterator[Tensor]) -> None:
    """One file, or numbered shards and their index."""
    shards = _shards(entries)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        write(folder / name, shard, itertools.islice(tensors, len(shard)))
    if len(shards) > 1:
        weight_map = {entry.key: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(entry.num_bytes for entry in entries)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(entries: Sequence[Entry]) -> list[list[Entry]]:
    """The entries in order, in runs of at most MAX_SHARD_BYTES, unless one alone is larger."""
    shards: list[list[Entry]] = [[]]
    room = MAX_SHARD_BYTES
    for entry in entries:
        if shards[-1] and entry.num_bytes > room:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(entry)
        room -= entry.num_bytes
    return shards

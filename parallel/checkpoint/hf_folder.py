"""Writes directories in Hugging Face's format, of a model whose pieces are on many ranks."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint.shards import DTYPE_NAMES, Entry, covered_once, replace_files, write_json, write_tensors
from parallel.errors import CheckpointError
from parallel.layout.layout import Box, Piece, slices
from parallel.mesh.agreement import Agreement
from parallel.mesh.collectives import gather_objects, receive, send
from parallel.mesh.mesh import Axis

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5}\.safetensors|\.safetensors(\.index\.json)?)")
MAX_SHARD_BYTES = 5 * 10**9


def write_folder(
    folder: Path, pieces: Iterable[Piece], entries: Sequence[Entry], *, axis: Axis, describe: Callable[[Path], None]
) -> None:
    """Write the tensors that `entries` describe into `folder`, and the files that `describe` writes there on rank 0.

    `pieces` are those that this rank owns: each element of each tensor is owned by one rank of the axis. They are sent
    to rank 0 in the order of the entries, one tensor at a time. Other files of the folder stay. If rank 0 cannot write,
    every rank raises a CheckpointError, and the folder stays as it was.
    """
    for entry in entries:  # checked before a rank waits for another
        if entry.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{entry.key}: it is {entry.dtype}, which safetensors cannot hold.")
    Agreement(axis).agree_on("an export")
    order = {entry.key: place for place, entry in enumerate(entries)}
    owned = sorted(pieces, key=lambda piece: order[piece.name])
    owners = _owners(gather_objects([(piece.name, piece.box) for piece in owned], axis), entries)
    with replace_files(folder, WEIGHTS, axis) as temporary:
        if axis.rank > 0:
            for piece in owned:
                send(piece.data.to("cpu", entries[order[piece.name]].dtype), axis, to=0)
        else:
            tensors = _assemble(entries, owners, owned, axis)
            try:
                _write_weights(temporary, entries, tensors)
                describe(temporary)
            finally:  # even after an error: the other ranks send, and wait until that is received
                for _ in tensors:
                    pass


Owners = dict[str, list[tuple[int, Box]]]
"""The boxes of each tensor, each with the rank that owns it, in the order in which they are sent."""


def _owners(boxes_of_ranks: list[list[tuple[str, Box]]], entries: Sequence[Entry]) -> Owners:
    """Return which rank owns which box, and check that the boxes cover each tensor exactly once."""
    owners: Owners = {entry.key: [] for entry in entries}
    for rank, boxes in enumerate(boxes_of_ranks):
        for name, box in boxes:
            owners[name].append((rank, box))
    for entry in entries:
        own = owners[entry.key]
        assert covered_once(entry.shape, [box for _, box in own]), f"{entry.key} is not owned once: {own}"
    return owners


def _assemble(entries: Sequence[Entry], owners: Owners, owned: Sequence[Piece], axis: Axis) -> Iterator[Tensor]:
    """Yield each tensor, whole, on rank 0, from its own pieces and those that other ranks send."""
    own = iter(owned)
    for entry in entries:
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for rank, box in owners[entry.key]:
            part = whole[slices(box)]
            part.copy_(next(own).data if rank == 0 else receive(part, axis, rank))
        yield whole


def _write_weights(folder: Path, entries: Sequence[Entry], tensors: Iterator[Tensor]) -> None:
    """Write one file, or numbered shards and their index."""
    shards = _shards(entries)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard, itertools.islice(tensors, len(shard)))
    if len(shards) > 1:
        weight_map = {entry.key: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(entry.num_bytes for entry in entries)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Divide the entries, in order, into shards of at most MAX_SHARD_BYTES; a larger tensor is a shard by itself."""
    shards: list[list[Entry]] = [[]]
    room = MAX_SHARD_BYTES
    for entry in entries:
        if shards[-1] and entry.num_bytes > room:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(entry)
        room -= entry.num_bytes
    return shards

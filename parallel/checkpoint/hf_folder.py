"""Writes directories in Hugging Face's format, of a model whose pieces are on many ranks."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint.replaced_folder import replace_files
from parallel.checkpoint.synced_file import write_json
from parallel.checkpoint.tensor_file import DTYPE_NAMES, Entry, write_tensors
from parallel.errors import CheckpointError, names_text
from parallel.layout.cover import covered_once
from parallel.layout.layout import Piece, slices
from parallel.layout.sources import Box
from parallel.mesh.agreement import Agreement
from parallel.mesh.collectives import gather_objects, receive, send
from parallel.mesh.mesh import Axis
from parallel.storage.no_room import naming

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5}\.safetensors|\.safetensors(\.index\.json)?)")
ADAPTER_FILES = re.compile(r"adapter_(config\.json|model\.(safetensors|bin))")
MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class FileNames:
    """The names of files with weights: `stem`.safetensors or, where `is_divided`, numbered shards of a limited size.

    Files in the folder that match `replaced` go when these are complete.
    """

    stem: str
    replaced: re.Pattern[str]
    is_divided: bool = True

    def replacing(self, others: re.Pattern[str]) -> "FileNames":
        """Return the same names, with which other files go too."""
        return replace(self, replaced=re.compile(f"{self.replaced.pattern}|{others.pattern}"))


MODEL = FileNames("model", WEIGHTS)
MERGED = MODEL.replacing(ADAPTER_FILES)
"""An adapter that stays beside the model that it was merged into would be read, and added once more."""
ADAPTER = FileNames("adapter_model", ADAPTER_FILES, is_divided=False)  # peft reads one file


def write_folder(
    folder: Path,
    pieces: Iterable[Piece],
    entries: Sequence[Entry],
    *,
    axis: Axis,
    describe: Callable[[Path], None],
    names: FileNames = MODEL,
) -> None:
    """Write the tensors that `entries` describe into `folder`, and the files that `describe` writes there on rank 0.

    `pieces` are those that this rank owns: each element of each tensor is owned by one rank of the axis. They are sent
    to rank 0 in the order of the entries, one tensor at a time. Other files of the folder stay, but for those that
    `names` replaces. If rank 0 cannot write, every rank raises a CheckpointError, and the folder stays as it was; so it
    does where a value is too large for the dtype of its entry.
    """
    order = {entry.key: place for place, entry in enumerate(entries)}
    owned = sorted(pieces, key=lambda piece: order[piece.name])
    if problem := too_large([(piece, entries[order[piece.name]].dtype) for piece in owned], axis):
        raise CheckpointError(f"{problem} Choose a dtype with a larger range, such as bf16 or fp32.")
    owners = _owners(gather_objects([(piece.name, piece.box) for piece in owned], axis), entries)
    tensors = _assemble(entries, owners, owned, axis)
    write_tensors_of(folder, entries, tensors, axis=axis, describe=describe, names=names)


def write_tensors_of(
    folder: Path,
    entries: Sequence[Entry],
    tensors: Iterator[Tensor],
    *,
    axis: Axis,
    describe: Callable[[Path], None],
    names: FileNames = MODEL,
) -> None:
    """Do as `write_folder`, with the tensors of the entries from an iterator that every rank runs to its end.

    It yields the tensors on rank 0, since the other ranks may have to send parts of them. Wide dtypes come first.
    """
    for entry in entries:  # checked before a rank waits for another
        if entry.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{entry.key}: it is {entry.dtype}, which safetensors cannot hold.")
    Agreement(axis).agree_on("an export")
    with replace_files(folder, names.replaced, axis) as temporary:
        try:
            if axis.rank == 0:
                _write_weights(temporary, entries, tensors, names)
                with naming(folder):
                    describe(temporary)
        finally:  # even after an error: the other ranks send, and wait until that is received
            for _ in tensors if axis.size > 1 else ():
                pass


def too_large(pieces: Iterable[tuple[Piece, torch.dtype]], axis: Axis) -> str:
    """Return which tensors have a finite value that its dtype would make infinite, on any rank; an empty text if none.

    Every rank of the axis calls this, with its own pieces, and gets the same text.
    """
    found = {}
    for piece, dtype in pieces:
        if dtype.is_floating_point and torch.finfo(dtype).max < torch.finfo(piece.data.dtype).max:
            largest = piece.data.abs().nan_to_num(nan=0, posinf=0).max()
            if largest.to(dtype).isinf():
                found[piece.name] = f"{piece.name} has a value of {largest:.4g}, which {dtype} cannot hold"
    everywhere = {name: text for texts in gather_objects(found, axis) for name, text in texts.items()}
    return f"{names_text(list(everywhere.values()))}." if everywhere else ""


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
    if axis.rank > 0:
        dtypes = {entry.key: entry.dtype for entry in entries}
        for piece in owned:
            send(piece.data.to("cpu", dtypes[piece.name]), axis, to=0)
        return
    own = iter(owned)
    for entry in entries:
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for rank, box in owners[entry.key]:
            part = whole[slices(box)]
            part.copy_(next(own).data if rank == 0 else receive(part, axis, rank))
        yield whole


def _write_weights(folder: Path, entries: Sequence[Entry], tensors: Iterator[Tensor], of: FileNames) -> None:
    """Write one file, or numbered shards and their index."""
    shards = _shards(entries) if of.is_divided else [list(entries)]
    names = [f"{of.stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [f"{of.stem}.safetensors"]
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

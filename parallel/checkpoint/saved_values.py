"""The values of Python in a checkpoint, of every rank: once where the ranks have the same, else those of each.

The index has their JSON and the dtype and shape of each tensor; the tensors lie in the files of the ranks.
"""

import logging
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from parallel.checkpoint.index import Index
from parallel.checkpoint.shared_failure import fail_together
from parallel.checkpoint.tensor_file import DTYPE_NAMES
from parallel.checkpoint.values import decode, dtype_of, encode, name_of
from parallel.errors import CheckpointError
from parallel.layout.layout import Piece
from parallel.mesh.collectives import gather_objects
from parallel.mesh.mesh import Axis

KIND = "value"
"""The kind of the tensors that belong to values, in the names of a checkpoint: value/RANK/INDEX."""

log = logging.getLogger(__name__)


def encode_on_ranks(values: Mapping[str, Any], axis: Axis) -> tuple[list[Any], list[Piece]]:
    """Return what the index has of every rank's values, the same on all ranks, and the pieces that this rank saves.

    Raises CheckpointError on every rank, with its path, for a value that cannot be stored. Nothing is written then.
    """
    with fail_together(axis):
        own = encode(values)
    entry = {"json": own.json, "tensors": [[name_of(x.dtype), list(x.shape)] for x in own.tensors]}
    found = gather_objects((own.digest(), entry), axis)
    is_same = len({digest for digest, _ in found}) == 1
    pieces = [
        Piece(f"{KIND}/{axis.rank}/{i}", tuple(x.shape), tuple((0, size) for size in x.shape), x)
        for i, x in enumerate(own.tensors)
        if x.numel() and (axis.rank == 0 or not is_same)
    ]
    return [entry for _, entry in found[: 1 if is_same else len(found)]], pieces


def read_values(index: Index, entries: Sequence[Any], axis: Axis) -> dict[str, Any]:
    """Return this rank's values of a checkpoint: its own if as many ranks saved it, else those of rank 0.

    The second is logged as a warning where the ranks had different values. Raises CheckpointError, before memory is
    allocated for a tensor that the checkpoint does not have. It contains no collective.
    """
    if not entries:
        raise CheckpointError(f"{index.folder} is no checkpoint of this program: it has the values of no rank.")
    rank = axis.rank if len(entries) == axis.size else 0
    if len(entries) not in (1, axis.size) and axis.rank == 0:
        log.warning(
            "%s: extra differed between the %d ranks that saved it; rank 0's is used", index.folder.name, len(entries)
        )
    tensors, json = _tensors_of(index, rank, entries[rank]), entries[rank].get("json")
    pieces = [
        Piece(f"{KIND}/{rank}/{i}", tuple(x.shape), tuple((0, size) for size in x.shape), x)
        for i, x in enumerate(tensors)
        if x.numel()
    ]
    index.archive.read_into(pieces)
    values = decode(json, tensors)
    if not isinstance(values, dict):
        raise CheckpointError(f"{index.folder} is no checkpoint of this program: its values have no names.")
    return {"extra": {}} | values


def _tensors_of(index: Index, rank: int, entry: Mapping[str, Any]) -> list[Tensor]:
    """Return tensors of the dtypes and shapes that the values of a rank have, without their elements."""
    found = []
    try:
        for i, (dtype, shape) in enumerate(entry["tensors"]):
            sizes = tuple(int(size) for size in shape)
            if prod(sizes):
                index.archive.check(f"{KIND}/{rank}/{i}", sizes)
            if dtype_of(dtype) not in DTYPE_NAMES:
                raise ValueError(f"it has values of {dtype}")
            found.append(torch.empty(sizes, dtype=dtype_of(dtype)))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{index.folder} is no checkpoint of this program: {error}.") from error
    return found

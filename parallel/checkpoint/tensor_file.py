"""A safetensors file of ours: its header, and its tensors, which are written one at a time."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint.synced_file import write_synced
from parallel.errors import CheckpointError
from parallel.regular_file import open_regular

DTYPE_NAMES = {  # as a safetensors header has them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
}

METADATA = {"format": "pt", "writer": "colonnade"}
"""The metadata in the header of a file. (Transformers refuses a file without a format.)"""


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file, as its header describes it."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(file: Path, entries: Sequence[Entry], tensors: Iterable[Tensor]) -> str:
    """Write `tensors`, which `entries` describe in the same order, one at a time: the host never holds two of them.

    Return the SHA-256 of the file. A reader maps it, so each tensor must start at a multiple of its item size: wide
    dtypes come before narrow ones.
    """
    with write_synced(file) as out:
        out.write(_header(entries))
        for entry, tensor in zip(entries, tensors, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), entry
            out.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return out.hexdigest()


def is_ours(file: Path) -> bool:
    """Return whether `write_tensors` wrote a file, by its header; False also for one that cannot be read."""
    start = json.dumps({"__metadata__": METADATA}).encode()[:-1]
    try:
        with open_regular(file, CheckpointError, links=True) as content:
            return content.read(8 + len(start))[8:] == start
    except CheckpointError:
        return False


def file_size(entries: Sequence[Entry]) -> int:
    """Return the size of a file with these entries, in bytes."""
    return len(_header(entries)) + sum(entry.num_bytes for entry in entries)


def _header(entries: Sequence[Entry]) -> bytes:
    """Return a file's header: its length in 8 bytes, then JSON with each tensor's dtype, shape and offsets.

    It is padded with spaces, so that the data start at a multiple of 8 bytes.
    """
    header: dict[str, object] = {"__metadata__": METADATA}
    start = 0
    for entry in entries:
        stop = start + entry.num_bytes
        header[entry.key] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text

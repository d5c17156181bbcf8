"""A replica's part of a batch: of the samples before they are collated, or of a batch that is collated already."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from parallel.modules.shares import Replica, Share


@dataclass(frozen=True)
class Part:
    """A replica's part of a global batch, with the number of its samples and a digest of it, or what is wrong."""

    batch: Any
    total: int
    digest: int
    problem: str = ""

    def pin_memory(self, device: Any = None) -> "Part":
        """Return the same with the batch in pinned memory; torch's DataLoader calls this."""
        from torch.utils.data._utils.pin_memory import pin_memory

        return Part(pin_memory(self.batch, device), self.total, self.digest, self.problem)


@dataclass(frozen=True)
class PartOfItems:
    """A collate function that collates this replica's part of the samples alone."""

    collate: Callable[[Any], Any]
    replica: Replica

    def __call__(self, items: Sequence[Any]) -> Part:
        share = Share.of(len(items), self.replica)
        return Part(self.collate(items[share.rows]), len(items), digest(items))


@dataclass(frozen=True)
class PartOfBatch:
    """A collate function for items that are global batches themselves: it returns this replica's rows of one."""

    collate: Callable[[Any], Any]
    replica: Replica

    def __call__(self, item: Any) -> Part:
        batch = self.collate(item)
        if self.replica.size == 1:
            return Part(batch, 1, digest(batch))
        total, problem = num_samples(batch)
        if problem:
            return Part(None, 0, 0, problem)
        return Part(rows_of(batch, Share.of(total, self.replica).rows), total, digest(batch))


def num_samples(batch: Any) -> tuple[int, str]:
    """Return the number of samples in a batch, which is dim 0 of each of its tensors, and what is wrong with it."""
    sizes: dict[str, int | None] = {}
    _collect_sizes(batch, "batch", sizes)
    found = set(sizes.values())
    if len(found) == 1 and None not in found:
        return int(found.pop() or 0), ""
    has = ", ".join(f"{name} {'no dim' if size is None else size}" for name, size in sizes.items()) or "no tensor"
    return 0, (
        "dataloader: a batch that is to be divided along dim 0 needs the same dim 0 in each of its tensors, but it has"
        f" {has}. Give the DataLoader single samples and a batch_size, or make every tensor [samples, ...]."
    )


def _collect_sizes(x: Any, name: str, sizes: dict[str, int | None]) -> None:
    if isinstance(x, Tensor | np.ndarray):
        sizes[name] = x.shape[0] if x.ndim else None
    elif isinstance(x, Mapping):
        for key in x:
            _collect_sizes(x[key], str(key), sizes)
    elif isinstance(x, list | tuple) and any(isinstance(y, Tensor | np.ndarray | Mapping | list | tuple) for y in x):
        for i, y in enumerate(x):
            _collect_sizes(y, f"{name}[{i}]", sizes)
    elif isinstance(x, list | tuple):  # one value for each sample
        sizes[name] = len(x)
    elif not isinstance(x, str | bytes | int | float | bool | None):
        sizes[f"{name} ({type(x).__name__})"] = None


def rows_of(x: Any, rows: slice) -> Any:
    """Return these rows of a batch in which `num_samples` finds nothing wrong; a number or a text is kept as it is."""
    if isinstance(x, Tensor | np.ndarray):
        return x[rows]
    if isinstance(x, Mapping):
        parts = {key: rows_of(x[key], rows) for key in x}
        return parts if type(x) is dict else type(x)(parts)  # type: ignore[call-arg]
    if isinstance(x, list | tuple):
        are_samples = not any(isinstance(y, Tensor | np.ndarray | Mapping | list | tuple) for y in x)
        parts_of = list(x[rows]) if are_samples else [rows_of(y, rows) for y in x]
        return type(x)(*parts_of) if hasattr(x, "_fields") else type(x)(parts_of)
    return x


def digest(x: Any) -> int:
    """Return a number that differs, in all likelihood, where two ranks have read different samples."""
    crc = 0
    for leaf in tree_leaves(dict(x) if isinstance(x, Mapping) else x):
        crc = zlib.crc32(_bytes_of(leaf), crc)
    return crc


def _bytes_of(leaf: Any) -> bytes | memoryview:
    """Return the content of a leaf as bytes; its type's name where its content has no form that all ranks share."""
    if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
        return leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    if isinstance(leaf, np.ndarray) and leaf.dtype != object:
        return leaf.tobytes()
    if isinstance(leaf, Mapping):
        return digest(leaf).to_bytes(4, "big")
    return (repr(leaf) if isinstance(leaf, str | bytes | int | float | None) else type(leaf).__name__).encode()

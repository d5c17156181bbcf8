"""Arrays that were made from files once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from models.data.documents import Array, MemoryStore, Store
from models.data.sources import Source

Report: TypeAlias = Callable[[float, int], None]
Work: TypeAlias = Callable[[Store, Report], dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """Arrays by name, and what JSON can say of them."""

    arrays: Mapping[str, Array]
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Cache:
    """A folder of entries."""

    folder: Path


def made(cache: Cache | None, source: Source, key: Mapping[str, Any], work: Work) -> Entry:
    """Return what `work` makes of a source. Without a cache it is made in memory."""
    store = MemoryStore()
    metadata = work(store, lambda fraction, num_tokens: None)
    return Entry(store.arrays(), metadata)

"""Documents as token ids, one after another, and the row of them that a corpus is cut from."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from models.tokenizer import Ids

Array: TypeAlias = npt.NDArray[Any]

BUFFERED = 1 << 18  # tokens that are gathered before they are appended to a store


@dataclass(frozen=True)
class Document:
    """The tokens of a text or of a conversation, with those that begin and end it: ids[T].

    `is_learned`: whether the token is a label of the loss, bool [T]. None: all tokens are. `continues`: these tokens go
    on with the document before, which comes in parts because it is long.
    """

    ids: Ids
    is_learned: npt.NDArray[np.bool_] | None = None
    continues: bool = False


@dataclass(frozen=True)
class DocumentRow:
    """Documents joined to one row, tokens[T], which may be mapped from a file.

    Document i is tokens[starts[i]:starts[i+1]]. `starts` is int64 [number of documents + 1]. `is_learned[T]` is there
    where the documents have it. `digest` is a checksum of tokens and is_learned, and not of starts: text, and a file of
    the same token ids, are the same data. `messages` say what was read otherwise than the user may expect.
    """

    tokens: Ids
    starts: npt.NDArray[np.int64]
    is_learned: npt.NDArray[np.bool_] | None = None
    digest: int = 0
    messages: tuple[str, ...] = ()

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

    @property
    def digest_with_starts(self) -> int:
        """A checksum of all, by which data are known whose documents matter."""
        return digest_of(self.starts, self.digest)


class ArrayStore(Protocol):
    """Arrays that grow, by name: in memory, or in files."""

    def append(self, name: str, values: Array) -> None:
        """Append values to the array of this name, whose dtype is that of the first ones."""


class MemoryStore:
    """Arrays that grow in memory."""

    def __init__(self) -> None:
        self._parts: dict[str, list[Array]] = {}

    def append(self, name: str, values: Array) -> None:
        self._parts.setdefault(name, []).append(values)

    def arrays(self) -> dict[str, Array]:
        """Return the arrays, whole."""
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}


class RowWriter:
    """Writes documents, one after another, into a store: the arrays `tokens`, `starts` and `is_learned`.

    `end` gives the token that stands between two documents, and belongs to the first of them; it is asked for where
    there is a second one. No token is put there where the first document ends with it already, or the second begins
    with it. None: nothing stands between documents. `vocab_size` decides the dtype of the tokens.
    """

    def __init__(self, store: ArrayStore, vocab_size: int, end: Callable[[], int] | None) -> None:
        self.num_tokens = self.num_documents = self.digest = 0
        self._store, self._end = store, end
        self._counts = np.zeros(0, np.int64)
        self._dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
        self._last: int | None = None
        self._ids: list[Ids] = []
        self._learned: list[Array] = []
        self._starts: list[int] = []
        self._buffered = 0

    def add(self, document: Document) -> None:
        """Write a document, which has a token, or more of the one before."""
        if not document.continues:
            if self._last is not None and self._end is not None:
                end = self._end()
                if end not in (self._last, int(document.ids[0])):
                    self._put(np.array([end], np.int32), None if document.is_learned is None else np.array([True]))
            self._starts.append(self.num_tokens)
            self.num_documents += 1
        self._put(document.ids, document.is_learned)
        self._last = int(document.ids[-1])
        if self._buffered >= BUFFERED:
            self._flush()

    def finish(self) -> None:
        """Write what is still in memory, and the end of the last document."""
        self._starts.append(self.num_tokens)
        self._flush()
        self._store.append("counts", self._counts)

    def _put(self, ids: Ids, is_learned: npt.NDArray[np.bool_] | None) -> None:
        self._ids.append(ids)
        if is_learned is not None:
            self._learned.append(is_learned)
        self.num_tokens += len(ids)
        self._buffered += len(ids)

    def _flush(self) -> None:
        if self._ids:
            ids = np.concatenate(self._ids)
            self.digest = digest_of(ids, self.digest)
            self._counts = sum_of_counts(self._counts, np.bincount(ids))
            self._store.append("tokens", ids.astype(self._dtype))
        if self._learned:
            is_learned = np.concatenate(self._learned)
            self.digest = zlib.crc32(is_learned.tobytes(), self.digest)
            self._store.append("is_learned", is_learned)
        if self._starts:
            self._store.append("starts", np.array(self._starts, np.int64))
        self._ids, self._learned, self._starts, self._buffered = [], [], [], 0


def digest_of(ids: Ids, before: int = 0) -> int:
    """Return a checksum of token ids, which does not depend on their dtype, after the checksum of those before."""
    return zlib.crc32(np.ascontiguousarray(ids, "<i8").data, before)


def sum_of_counts(counts: Array, more: Array) -> Array:
    """Return the sum of two arrays of counts, of which one may be shorter."""
    longer, shorter = (counts, more) if len(counts) >= len(more) else (more, counts)
    total = longer.astype(np.int64)
    total[: len(shorter)] += shorter
    return total

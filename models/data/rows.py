"""The row of documents of a source: its texts encoded, or its token ids as they stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.data.cache import Cache, CacheEntry, entry_of
from models.data.documents import ArrayStore, DocumentRow, RowWriter
from models.data.encoding import DocumentStream
from models.data.sources import Kind, Source
from models.data.token_files import first_outside, map_token_file, starts_after, survey
from models.tokenizer import Ids
from parallel.errors import DataError


@dataclass(frozen=True)
class Counted:
    """A row of documents, and how often each token id occurs in it, int64 [the largest id + 1]."""

    row: DocumentRow
    counts: Ids

    def count(self, id: int | None) -> int:
        return int(self.counts[id]) if id is not None and 0 <= id < len(self.counts) else 0


def encoded_row(
    documents: DocumentStream,
    source: Source,
    cache: Cache | None,
    *,
    key: Mapping[str, Any],
    vocab_size: int,
    end: Callable[[], int] | None,
) -> Counted:
    """Return the row of some documents, from the cache where they were encoded before.

    `key` says by what, beside the contents of the source, the tokens are decided. Raises DataError where the source has
    no token.
    """

    def write(store: ArrayStore, report: Callable[[float, int], None]) -> dict[str, Any]:
        writer = RowWriter(store, vocab_size, end)
        for document in documents:
            writer.add(document)
            report(documents.fraction, writer.num_tokens)
        writer.finish()
        return {"digest": writer.digest, "messages": documents.messages()}

    is_kept = cache is not None and source.kind is not Kind.BUILT_IN
    entry = entry_of(cache if is_kept else None, source, {"documents": 1, **key}, write)
    if "tokens" not in entry.arrays:
        raise DataError(f"{source.key}: {source.path} is empty: there is no token in it. Name a text.")
    return _counted(entry, [*source.messages, *entry.metadata["messages"]])


def _counted(entry: CacheEntry, messages: list[str]) -> Counted:
    arrays = entry.arrays
    row = DocumentRow(
        arrays["tokens"], arrays["starts"], arrays.get("is_learned"), int(entry.metadata["digest"]), tuple(messages)
    )
    return Counted(row, arrays["counts"])


def mapped_row(source: Source, cache: Cache | None, *, bin_dtype: str, vocab_size: int, end: int | None) -> Counted:
    """Return the row of token ids that files hold, mapped from the file, or from the cache where there are several.

    A document ends after each token `end`; None: all is one document. Raises DataError for an id outside the
    vocabulary.
    """
    parts = [map_token_file(source, file, bin_dtype) for file in source.files]
    dtype = bin_dtype if source.kind is Kind.BIN else ""

    def write(store: ArrayStore, report: Callable[[float, int], None]) -> dict[str, Any]:
        return survey(parts, store, report, copy=len(parts) > 1)

    entry = entry_of(cache, source, {"ids": 1, "dtype": dtype}, write)
    tokens = parts[0] if len(parts) == 1 else entry.arrays.get("tokens", parts[0])
    if entry.metadata["lowest"] < 0 or entry.metadata["highest"] >= vocab_size:
        raise _outside(source, parts, vocab_size, bin_dtype)
    starts = np.array([0, len(tokens)], np.int64)
    if end is not None:

        def write_starts(store: ArrayStore, report: Callable[[float, int], None]) -> dict[str, Any]:
            starts_after(tokens, end, store)
            return {}

        starts = entry_of(cache, source, {"starts": 1, "dtype": dtype, "end": end}, write_starts).arrays["starts"]
    row = DocumentRow(tokens, starts, None, int(entry.metadata["digest"]), source.messages)
    return Counted(row, entry.arrays["counts"])


def _outside(source: Source, parts: list[Ids], vocab_size: int, bin_dtype: str) -> DataError:
    id, position = first_outside(parts, vocab_size)
    advice = f"Set model.vocab_size to at least {id + 1}" if id >= 0 else "No id is negative: write the file again"
    if source.kind is Kind.BIN and bin_dtype == "uint32":
        advice += ", or data.bin_dtype=uint16 if that is what the file holds"
    return DataError(
        f"{source.key}: {source.path} has token {id} at position {position}, outside the vocabulary of {vocab_size}."
        f" {advice}."
    )

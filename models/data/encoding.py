"""Texts and records as documents of token ids, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Protocol

from models.data.documents import Document
from models.data.records import Records, text_of
from models.data.sources import Source
from models.data.texts import Texts
from models.tokenizer import Tokenizer

BATCH_CHARACTERS, BATCH_TEXTS = 1 << 20, 4096
LONG = 1 << 20
"""The characters from which on a text is encoded in parts."""


class DocumentStream(Protocol):
    """The documents of a source.

    While they are iterated, `fraction` is the share of the source that has been read; afterwards `messages` returns
    what was read otherwise than the user may expect.
    """

    @property
    def fraction(self) -> float: ...

    def __iter__(self) -> Iterator[Document]: ...

    def messages(self) -> list[str]: ...


def text_documents(source: Source, tokenizer: Tokenizer, text_key: str) -> DocumentStream:
    """Return the documents of texts, or of records with a text: each text is a document."""
    if source.kind.has_records:
        return RecordDocuments(Records(source), tokenizer, text_key)
    return TextDocuments(Texts(source), tokenizer)


class TextDocuments:
    """The documents of text files. A file without a token is left out."""

    def __init__(self, texts: Texts, tokenizer: Tokenizer) -> None:
        self._texts, self._tokenizer = texts, tokenizer

    @property
    def fraction(self) -> float:
        return self._texts.fraction

    def __iter__(self) -> Iterator[Document]:
        for name, document in encoded(self._texts, self._tokenizer):
            if document is None:
                self._texts.mention(name, "left out, since there is no token in it")
            else:
                yield document

    def messages(self) -> list[str]:
        return self._texts.messages()


class RecordDocuments:
    """The documents of records: the texts under one key. A record whose text has no token is left out, and counted."""

    def __init__(self, records: Records, tokenizer: Tokenizer, text_key: str) -> None:
        self._records, self._tokenizer, self._text_key = records, tokenizer, text_key
        self._num_records = self._num_empty = 0

    @property
    def fraction(self) -> float:
        return self._records.fraction

    def __iter__(self) -> Iterator[Document]:
        for _, document in encoded(self._texts(), self._tokenizer):
            if document is None:
                self._num_empty += 1
            else:
                yield document

    def messages(self) -> list[str]:
        if not self._num_empty:
            return []
        return [f"{self._num_empty} of {self._num_records} records are left out, since there is no token in their text"]

    def _texts(self) -> Iterator[tuple[str, Iterator[str]]]:
        for located in self._records.located(only=self._text_key):
            self._num_records += 1
            yield "", iter([text_of(located, self._text_key)])


def encoded(texts: Iterable[tuple[str, Iterator[str]]], tokenizer: Tokenizer) -> Iterator[tuple[str, Document | None]]:
    """Yield the name of each text and its document, None for a text without a token; a long document comes in parts."""
    names: list[str] = []
    batch: list[str] = []
    size = 0
    for name, chunks in texts:
        text, more = next(chunks, ""), next(chunks, None)
        is_long = more is not None or len(text) > LONG
        if not is_long:
            names.append(name)
            batch.append(text)
            size += len(text)
        if is_long or size >= BATCH_CHARACTERS or len(batch) >= BATCH_TEXTS:
            yield from _encoded_batch(names, batch, tokenizer)
            names, batch, size = [], [], 0
        if is_long:
            yield from _encoded_long(name, chain([text], [] if more is None else [more], chunks), tokenizer)
    yield from _encoded_batch(names, batch, tokenizer)


def _encoded_batch(names: list[str], texts: list[str], tokenizer: Tokenizer) -> Iterator[tuple[str, Document | None]]:
    for name, ids in zip(names, tokenizer.encode_documents(texts), strict=True):
        yield name, Document(ids) if len(ids) > tokenizer.num_special else None


def _encoded_long(name: str, chunks: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[str, Document | None]]:
    first = True
    for ids in tokenizer.encode_long(chunks):
        if len(ids):
            yield name, Document(ids, continues=not first)
            first = False
    if first:
        yield name, None

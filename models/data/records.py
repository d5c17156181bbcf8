"""Records, one at a time: of .jsonl files, of Parquet, and of folders that `datasets` saved."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeAlias

from models.data.file_starts import GZIP, LONGEST, byte_order_mark, packed_as
from models.data.saved_dataset import load_dataset
from models.data.sources import Kind, Source
from models.tokenizer import unwritable
from parallel.errors import DataError, closest, names_text, shown, size_text
from parallel.regular_file import open_regular, with_key

Record: TypeAlias = Mapping[str, Any]

PART, LONGEST_LINE = 1 << 18, 1 << 28  # bytes of a line that are read at a time, and in all
MOST_PACKED = 64  # times that a line of more than one part is longer than what it is unpacked from: no text is
MOST_BLANK = 10**5
AT_ONCE = 256  # rows of Parquet or of a dataset that are in memory at a time
LINES_RECIPE = "Write one record on each line: jq -c . FILE > NEW.jsonl (for an array: jq -c '.[]')."

QUESTIONS = (
    *(("instruction", "output"), ("instruction", "response"), ("question", "answer"), ("prompt", "response")),
    *(("prompt", "chosen"), ("query", "response"), ("input", "output")),
)
"""Keys under which published records have a question and its answer."""


@dataclass(frozen=True)
class Located:
    """A record, and where it stands: "FILE line 3" or "FILE row 3", counted from 1, for a message about it."""

    record: Record
    place: str


class Records:
    """The records of a source, in order. Iterating reads them again; one at a time is in memory.

    Raises DataError, with file and line, for what is no record. `fraction` is the share of the source that the latest
    iteration has read.
    """

    def __init__(self, source: Source) -> None:
        assert source.kind.has_records, source
        self.source = source
        self.fraction = 0.0

    def __iter__(self) -> Iterator[Record]:
        return (located.record for located in self.located())

    def located(self, *, only: str | None = None) -> Iterator[Located]:
        """Yield each record with its place. `only` names the one key that is needed, where the others cost time."""
        try:
            yield from self._located(only)
        except OSError as error:
            path = error.filename or self.source.path
            raise DataError(f"{self.source.key}: cannot read {path}: {error.strerror or error}.") from error

    def _located(self, only: str | None) -> Iterator[Located]:
        if self.source.kind is Kind.DATASET:
            yield from self._of_dataset(only)
            return
        sizes, done = [max(1, file.stat().st_size) for file in self.source.files], 0
        for file, size in zip(self.source.files, sizes, strict=True):
            is_lines = self.source.kind is Kind.LINES
            for record, number, share in self._lines(file) if is_lines else self._rows(file, only):
                self.fraction = (done + share * size) / sum(sizes)
                yield Located(record, f"{file} {'line' if is_lines else 'row'} {number}")
            done += size
        self.fraction = 1.0

    def _lines(self, file: Path) -> Iterator[tuple[Record, int, float]]:
        """Yield the records of a file of lines, the number of each line, and the share of the file up to it."""
        size, error = max(1, file.stat().st_size), with_key(DataError, self.source.key)
        with open_regular(file, error, links=True) as packed, self._unpacked(file, packed) as lines:
            number = blank = 0
            while line := self._line(lines, packed, f"{file} line {number + 1}"):
                number += 1
                blank = blank + 1 if line.isspace() else 0
                if blank > MOST_BLANK:
                    raise DataError(f"{self.source.key}: {file} has {blank} empty lines in a row. Take them out.")
                if number == 1:
                    line = line.removeprefix(BOM_UTF8)
                if not line.isspace():
                    yield self._record_of(line, f"{file} line {number}"), number, packed.tell() / size

    def _unpacked(self, file: Path, packed: BufferedReader) -> BufferedReader | gzip.GzipFile:
        """Return the lines of a file, which is unpacked where its name says so."""
        key, is_gzip = self.source.key, file.name.endswith(".gz")
        if is_gzip and (first := packed.peek(LONGEST)) and not first.startswith(GZIP):
            raise DataError(f"{key}: {file} is not packed by gzip. Rename it to {file.name.removesuffix('.gz')}.")
        lines = gzip.GzipFile(fileobj=packed) if is_gzip else packed
        start = self._read(lambda: lines.peek(LONGEST), f"{file} line 1")
        if (kind := packed_as(start)) is not None:
            recipe = f"Rename it to {file.name}.gz." if (kind, is_gzip) == ("gzip", False) else "Unpack or convert it."
            raise DataError(
                f"{key}: {file} has no lines of JSON: {'within, ' * is_gzip}it begins as {kind} does. {recipe}"
            )
        _, encoding = byte_order_mark(start)
        if encoding != "UTF-8":
            raise DataError(f"{key}: {file} is {encoding}. Convert it: iconv -f {encoding[:6]} -t UTF-8 FILE > NEW.")
        if start.lstrip().startswith(b"["):  # all of it may be one line
            raise DataError(f"{key}: {file} line 1 is a list, and not a record {{...}}. {LINES_RECIPE}")
        return lines

    def _line(self, lines: BufferedReader | gzip.GzipFile, packed: BufferedReader, place: str) -> bytes:
        """Return the next line, part by part: a small file may unpack to one that no memory holds.

        A line that begins as no record does is returned as far as it has been read.
        """
        parts, size = [], 0
        while part := self._read(lambda: lines.readline(PART), place):
            parts.append(part)
            size += len(part)
            if part.endswith(b"\n") or not parts[0].removeprefix(BOM_UTF8).lstrip().startswith(b"{"):
                break
            if size > LONGEST_LINE or size > max(PART, MOST_PACKED * packed.tell()):
                raise DataError(
                    f"{self.source.key}: {place} is too long for a record: {size_text(size)} of it were read, from"
                    f" {size_text(packed.tell())} of the file. {LINES_RECIPE}"
                )
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read(self, read: Callable[[], bytes], place: str) -> bytes:
        try:
            return read()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"{self.source.key}: {place.replace(' line ', ' is damaged near line ')}: {error}. Download or pack it"
                " again."
            ) from error

    def _record_of(self, line: bytes, place: str) -> Record:
        key = self.source.key
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise DataError(
                f"{key}: {place} is not UTF-8: byte 0x{line[error.start]:02x} at position {error.start}. Convert the"
                " file, as in: iconv -f LATIN1 -t UTF-8."
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{key}: {place} is not JSON: {error}. {LINES_RECIPE}") from error
        if not isinstance(record, dict):
            raise DataError(f"{key}: {place} is {_json_type(record)}, and not a record {{...}}. {LINES_RECIPE}")
        return record

    def _rows(self, file: Path, only: str | None) -> Iterator[tuple[Record, int, float]]:
        """Yield the rows of a Parquet file, the number of each, and the share of the file up to it."""
        parquet, number = _import_parquet(self.source), 0
        with _naming(file, self.source.key), parquet.ParquetFile(file, memory_map=True, pre_buffer=False) as rows:
            num_rows = max(1, rows.metadata.num_rows)
            columns = [only] if only in rows.schema_arrow.names else None  # else the error names all keys
            for batch in rows.iter_batches(batch_size=AT_ONCE, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield record, number, number / num_rows

    def _of_dataset(self, only: str | None) -> Iterator[Located]:
        dataset, number = load_dataset(self.source), 0
        if only in dataset.column_names:
            dataset = dataset.select_columns([only])
        for table in dataset.with_format("arrow").iter(AT_ONCE):
            for record in table.to_pylist():
                number += 1
                self.fraction = number / len(dataset)
                yield Located(record, f"{self.source.path} row {number}")
        self.fraction = 1.0


def text_of(located: Located, text_key: str) -> str:
    """Return the text of a record. Raises DataError where the key is missing, or its value is no text."""
    record, place = located.record, located.place
    if text_key not in record:
        keys = [str(key) for key in record]
        hint = _conversation_hint(record) or _key_hint(record, text_key)
        has = f"it has {names_text(map(repr, keys))}" if keys else "it is empty"
        raise DataError(f"data.text_key: {place} has no key {text_key!r}: {has}.{hint}")
    text = record[text_key]
    if not isinstance(text, str):
        raise DataError(
            f"data.text_key: {place}: {text_key!r} is {_json_type(text)}, and not text: {shown(text)}. Leave out such"
            " records, or name another key."
        )
    return checked_text(text, f"data.text_key: {place}: {text_key!r}")


def checked_text(text: str, name: str) -> str:
    """Return a text. Raises DataError where no encoding can write it."""
    if found := unwritable(text):
        raise DataError(f"{name} has {found}. Leave out the record, or replace it.")
    return text


def _conversation_hint(record: Record) -> str:
    """Return how to make `messages` of a record with a question and its answer, whose names are usual ones."""
    for question, answer in QUESTIONS:
        if isinstance(record.get(question), str) and isinstance(record.get(answer), str):
            content = f".{question}" if question == "input" or "input" not in record else f".{question} + .input"
            messages = f'[{{role: "user", content: ({content})}}, {{role: "assistant", content: .{answer}}}]'
            return f" To train on {answer!r} as an answer: jq -c '{{messages: {messages}}}' FILE > NEW.jsonl."
    return ""


def _key_hint(record: Record, text_key: str) -> str:
    """Return which key may be meant."""
    texts = [str(key) for key in record if isinstance(record[key], str)]
    match = closest(text_key, map(str, record)) or (texts[0] if len(texts) == 1 else None)
    if match is not None:
        return f" Set data.text_key={match}."
    return " Set data.text_key to one of them." if texts else ""


def _import_parquet(source: Source) -> Any:
    try:
        import pyarrow.parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError(f"{source.key}: {source.path} needs the package 'pyarrow': pip install pyarrow.") from error
    return pyarrow.parquet


@contextmanager
def _naming(file: Path, key: str) -> Iterator[None]:
    """Have an error of pyarrow's be a DataError that names the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error).rstrip(".")
        raise DataError(
            f"{key}: {file} is not Parquet, or is damaged: {reason}. Download or write it again."
        ) from error


def _json_type(value: object) -> str:
    """Return what JSON calls a value: a list, a number, null."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"of type {type(value).__name__}")

"""Texts of files, read in chunks as Python's text mode reads them, or refused by the file's name."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path

from models.data.file_starts import byte_order_mark, packed_as, start_of
from models.data.sources import BUILT_IN, Kind, Source
from parallel.errors import DataError, names_text
from parallel.regular_file import open_regular, with_key

CHUNK = 1 << 20  # bytes: a file may be larger than the memory


class Texts:
    """The texts of a source, in order: the built-in one, FILE.txt, or the *.txt of a folder by their names.

    Iterating yields the name of each text, and an iterator of its chunks, of which the first may be the only one.
    `fraction` is the share of the source that has been read. Raises DataError for a file that cannot be read as text.
    """

    def __init__(self, source: Source) -> None:
        assert source.kind in (Kind.BUILT_IN, Kind.TEXT), source
        self.source = source
        self.fraction = 0.0
        self._mentioned: dict[str, list[str]] = {}

    def __iter__(self) -> Iterator[tuple[str, Iterator[str]]]:
        if self.source.kind is Kind.BUILT_IN:
            yield BUILT_IN, iter([built_in_text()])
        sizes, done = [file.stat().st_size for file in self.source.files], 0
        for file, size in zip(self.source.files, sizes, strict=True):
            yield file.name, self._read(file, done, max(1, sum(sizes)))
            done += size
        self.fraction = 1.0

    def messages(self) -> list[str]:
        """Return a message for each thing that was read otherwise than as it stands, or left out."""
        return [f"{what}: {names_text(names)}" for what, names in self._mentioned.items()]

    def mention(self, name: str, what: str) -> None:
        """Add a file to those of which a message says this."""
        names = self._mentioned.setdefault(what, [])
        if name not in names[-1:]:
            names.append(name)

    def _read(self, file: Path, done: int, total: int) -> Iterator[str]:
        """Yield a file's text without its byte-order mark, and with line ends of \\n, in chunks that are not empty."""
        start = start_of(file, self.source.key)
        if kind := packed_as(start):
            raise DataError(
                f"{self.source.key}: {file} is no text: it begins as {kind} does. Unpack or convert it first."
            )
        mark, encoding = byte_order_mark(start)
        if encoding != "UTF-8":
            self.mention(file.name, f"read as {encoding}, as its byte-order mark says")
        line_ends = io.IncrementalNewlineDecoder(None, translate=True)
        for text, num_read in self._decoded(file, len(mark), encoding):
            self.fraction = (done + num_read) / total
            if "\r" in text:
                self.mention(file.name, r"line ends \r\n and \r are read as \n")
            if chunk := line_ends.decode(text):
                yield chunk
        if chunk := line_ends.decode("", final=True):
            yield chunk

    def _decoded(self, file: Path, skipped: int, encoding: str) -> Iterator[tuple[str, int]]:
        """Yield the text of a file in chunks, and the number of bytes that have been read with each."""
        decoder, num_read = codecs.getincrementaldecoder(encoding)(), skipped
        with open_regular(file, with_key(DataError, self.source.key), links=True) as stream:
            stream.seek(skipped)
            while True:
                content = stream.read(CHUNK)
                waiting = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(content, final=not content)
                except UnicodeDecodeError as error:
                    at = num_read - waiting + error.start
                    raise DataError(
                        f"{self.source.key}: {file} is not {encoding}: byte 0x{error.object[error.start]:02x} at"
                        f" position {at}. Convert it, as in: iconv -f LATIN1 -t UTF-8."
                    ) from error
                if "\0" in text:
                    raise DataError(
                        f"{self.source.key}: {file} is no text: it has a zero byte, near position"
                        f" {num_read + text.index(chr(0))}. If it is UTF-16 without a byte-order mark, convert it,"
                        " as in: iconv -f UTF-16LE -t UTF-8."
                    )
                num_read += len(content)
                yield text, num_read
                if not content:
                    return


def built_in_text() -> str:
    """Return the built-in text: 465 KB of English that comes with every CPython."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))

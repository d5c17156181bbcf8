"""Standard output that cannot end a run: one that is closed, breaks, or writes no characters but ASCII."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

PLAIN = str.maketrans({"×": "x", "–": "-", "—": "-", "−": "-", "…": "...", "·": ".", "≈": "~", "→": "->", "≤": "<="})
"""The characters that our own text has, and what stands for them in ASCII."""


class SafeOutput(io.TextIOBase):
    """Writes to a stream of text. Characters that its encoding lacks are replaced.

    Once a write fails, because the reader has gone or a disk is full, everything is thrown away: a run goes on
    without an output that nobody reads.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream, self._is_lost = stream, False

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def write(self, text: str) -> int:
        if not self._is_lost:
            try:
                self._stream.write(self._encodable(text))
            except (OSError, ValueError):  # ValueError: the stream is closed
                self._lose()
        return len(text)

    def flush(self) -> None:
        if not self._is_lost:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._lose()

    def isatty(self) -> bool:
        return not self._is_lost and self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def _encodable(self, text: str) -> str:
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            return text.translate(PLAIN).encode(self.encoding, "replace").decode(self.encoding)
        return text

    def _lose(self) -> None:
        """Send what is still in the stream's buffer nowhere, so that Python can flush it when the process ends."""
        self._is_lost = True
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):
            return  # it has no descriptor, or is closed: nothing will be flushed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


@contextmanager
def safe_output() -> Iterator[None]:
    """Have `sys.stdout` be safe in the block.

    A process that was started without one gets the null device, whose descriptor no other file can have then.
    """
    before: Any = sys.stdout  # None where the descriptor was closed when Python started
    sys.stdout = SafeOutput(before or open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout = before

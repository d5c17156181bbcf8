"""The first bytes of files: byte-order marks, and files that are not what their name says."""

import codecs
from pathlib import Path

from models.weight_files import LFS_POINTER
from parallel.errors import DataError
from parallel.regular_file import open_regular, with_key

BYTE_ORDER_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
)
GZIP = b"\x1f\x8b"
STARTS = {
    GZIP: "gzip",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"%PDF-": "PDF",
    b"PAR1": "Parquet",
    b"\x93NUMPY": "numpy's .npy",
    b"ARROW1": "Arrow",
    LFS_POINTER: "a pointer of Git LFS",
}
"""Kinds of files by the bytes that they begin with."""

LONGEST = max(map(len, STARTS))


def start_of(file: Path, key: str) -> bytes:
    """Return the first bytes of a file. Raises DataError, with the config's key, where it cannot be read."""
    with open_regular(file, with_key(DataError, key), links=True) as stream:
        return stream.read(LONGEST)


def packed_as(start: bytes) -> str | None:
    """Return what a file that begins with these bytes is, where that is neither text nor token ids."""
    return next((kind for begin, kind in STARTS.items() if start.startswith(begin)), None)


def byte_order_mark(start: bytes) -> tuple[bytes, str]:
    """Return the byte-order mark that a text begins with, and its encoding; without a mark it is UTF-8."""
    return next(((mark, name) for mark, name in BYTE_ORDER_MARKS if start.startswith(mark)), (b"", "UTF-8"))

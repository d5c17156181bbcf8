"""Files that hold token ids, mapped into memory, and what is known of their ids after reading them once."""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from models.data.documents import Array, ArrayStore, digest_of, sum_of_counts
from models.data.file_starts import GZIP, packed_as, start_of
from models.data.sources import Kind, Source
from models.tokenizer import Ids
from parallel.errors import DataError
from parallel.regular_file import open_regular, printable, with_key

AT_ONCE = 1 << 22  # tokens: a file may be larger than the memory
COUNTED = 1 << 22  # ids from here on are not counted one by one: no vocabulary has them
LOOKED_AT, LOOKED_AT_AS_TEXT = 1 << 20, 1 << 12  # ids, and bytes, by which a file of something else is known
UPPER, MANY = 16, 1 << 12  # the upper halves of ids below 2**20; a lower half that only a large vocabulary has
LLM_C = (20240520, 20240801)  # the first number of token files of llm.c, and of modded-nanogpt
LLM_C_HEADER = 1024  # bytes
MOST_NPY_HEADER = 10_000  # bytes, as for numpy
MEGATRON_INDEX = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}


def map_token_file(source: Source, file: Path, bin_dtype: str) -> Ids:
    """Return the token ids of a .npy or .bin file, mapped into memory. Raises DataError for a file of another kind."""
    return _map_bin(source, file, bin_dtype) if source.kind is Kind.BIN else _map_npy(source, file)


def survey(parts: list[Ids], store: ArrayStore, report: Callable[[float, int], None], *, copy: bool) -> dict[str, Any]:
    """Return digest, smallest and largest of all ids; the number of each goes to the store as `counts`.

    `copy` appends the ids to the store, too, as `tokens`. One block of them is in memory at a time.
    """
    total, done, digest = sum(map(len, parts)), 0, 0
    lowest, highest, counts = 0, -1, np.zeros(0, np.int64)
    dtype = np.result_type(*(part.dtype for part in parts))
    dtype = dtype if dtype.kind in "iu" else np.dtype(np.int64)  # of uint64 and int64 numpy makes float64
    for part in parts:
        for start in range(0, len(part), AT_ONCE):
            block = part[start : start + AT_ONCE]
            lowest, highest = min(lowest, int(block.min())), max(highest, int(block.max()))
            counts = sum_of_counts(counts, counts_of(block))
            digest = digest_of(block, digest)
            if copy:
                store.append("tokens", block.astype(dtype))
            done += len(block)
            report(done / total, done)
    store.append("counts", counts)
    return {"digest": digest, "lowest": lowest, "highest": highest}


def counts_of(ids: Ids) -> Array:
    """Return how often each id occurs, int64 [the largest + 1]."""
    within = ids[(ids >= 0) & (ids < COUNTED)] if ids.dtype.itemsize > 2 or ids.dtype.kind == "i" else ids
    return np.bincount(within.astype(np.int64, copy=False))


def first_outside(parts: list[Ids], vocab_size: int) -> tuple[int, int]:
    """Return the first id that is outside the vocabulary, and its position, where there is one."""
    before = 0
    for part in parts:
        for start in range(0, len(part), AT_ONCE):
            block = part[start : start + AT_ONCE]
            (outside,) = np.nonzero((block < 0) | (block >= vocab_size))
            if len(outside):
                return int(block[outside[0]]), before + start + int(outside[0])
        before += len(part)
    raise AssertionError("all ids are in the vocabulary")


def starts_after(tokens: Ids, end: int, store: ArrayStore) -> None:
    """Append the places where documents start to the store, as `starts`: one document ends after each token `end`."""
    store.append("starts", np.zeros(1, np.int64))
    for start in range(0, len(tokens), AT_ONCE):
        (found,) = np.nonzero(tokens[start : start + AT_ONCE] == end)
        store.append("starts", found.astype(np.int64) + start + 1)
    if not len(tokens) or tokens[-1] != end:
        store.append("starts", np.array([len(tokens)], np.int64))


def _map_npy(source: Source, file: Path) -> Ids:
    _check_npy_header(source, file)
    try:
        with np.errstate(over="ignore"):  # of a shape that cannot be: it is refused
            tokens: Array = np.lib.format.open_memmap(file, mode="r")
    except OSError as error:
        raise DataError(f"{source.key}: cannot read {file}: {error.strerror}.") from error
    except Exception as error:  # a header that means nothing makes Python's parser raise a MemoryError, say
        reason = printable(str(error) or "its header cannot be read")
        raise DataError(f"{source.key}: {file} is not an array that numpy can memory-map: {reason}") from error
    if tokens.ndim != 1:
        raise DataError(f"{source.key}: {file} has {tokens.ndim} dimensions, {tokens.shape}, not 1. Save it flattened.")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(f"{source.key}: {file} holds {tokens.dtype}, not token ids. Save it as an integer type.")
    return tokens


def _check_npy_header(source: Source, file: Path) -> None:
    """Raise DataError for a header that says it is long: numpy reads all of it before it looks at the length."""
    with open_regular(file, with_key(DataError, source.key), links=True) as stream:
        start = stream.read(len(np.lib.format.MAGIC_PREFIX) + 6)
    version, length = start[6:7], start[8:10] if start[6:7] == b"\1" else start[8:12]
    if version and int.from_bytes(length, "little") > MOST_NPY_HEADER:
        raise DataError(
            f"{source.key}: {file} is not an array that numpy can memory-map: its header has more than"
            f" {MOST_NPY_HEADER} bytes."
        )


def _map_bin(source: Source, file: Path, bin_dtype: str) -> Ids:
    _refuse_other_programs(source, file, bin_dtype)
    dtype = np.dtype(bin_dtype).newbyteorder("<")
    try:
        size = file.stat().st_size
        if size % dtype.itemsize:
            raise DataError(
                f"{source.key}: {file} has {size} bytes, which is no multiple of the {dtype.itemsize} bytes of"
                f" {bin_dtype} (data.bin_dtype): it is cut off, or of another dtype. Write it again, as in:"
                f" ids.astype(numpy.{bin_dtype}).tofile(FILE)."
            )
        tokens: Array = np.memmap(file, dtype, mode="r") if size else np.zeros(0, dtype)
    except OSError as error:
        raise DataError(f"{source.key}: cannot read {file}: {error.strerror}.") from error
    _refuse_other_contents(source, file, tokens)
    return tokens


def _refuse_other_contents(source: Source, file: Path, tokens: Ids) -> None:
    """Raise DataError for ids that are cut from longer ones, or from text: most would be within a vocabulary."""
    begin, key = np.array(tokens[:LOOKED_AT]), source.key
    if len(begin) > 8 and (size := _size_of_ids(begin)) != begin.itemsize:
        what = "0" if not begin[1::2].any() else f"below {UPPER}"
        convert = f"Write it again, numpy.fromfile({str(file)!r}, 'int64').astype('uint32').tofile('NEW.bin'), and set"
        raise DataError(
            f"{key}: every second id in {file} is {what}, as when ids of {size} bytes are read as {begin.dtype.name}."
            f" {'Set' if size == 4 else convert} data.bin_dtype=uint32."
        )
    if is_text(begin.tobytes()[:LOOKED_AT_AS_TEXT]):
        raise DataError(f"{key}: {file} has no token ids: it is text. Rename it to {file.with_suffix('.txt').name}.")


def _size_of_ids(begin: Ids) -> int:
    """Return the bytes of an id of which these are parts, the lowest first, as far as that can be seen; else their own.

    The upper half of an id of 4 bytes is 0, or a small number where a vocabulary has more than 65,536 ids.
    """
    lower, upper = begin[::2], begin[1::2]
    if begin.itemsize == 4:
        return 4 if upper.any() else 8
    is_small = len(upper) >= 64 and upper.max() < UPPER and lower.max() >= MANY
    if upper.any() and not is_small:
        return 2
    return 4 if begin[2::4].any() or begin[3::4].any() else 8


def is_text(content: bytes) -> bool:
    """Return whether the first bytes of a file, which may end within a character, are those of a text."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(content)
    except UnicodeDecodeError:
        return False
    return len(set(text)) >= 8 and all(character.isprintable() or character in "\t\n\r" for character in text)


def _refuse_other_programs(source: Source, file: Path, bin_dtype: str) -> None:
    """Raise DataError for a file that is no row of ids: it has a header, is packed, or has an index beside it."""
    start, key = start_of(file, source.key), source.key
    kind = packed_as(start)
    if kind and (kind != "gzip" or start.startswith(GZIP + b"\x08\x00")):  # two bytes could be an id
        raise DataError(f"{key}: {file} has no token ids: it begins as {kind} does. Unpack or convert it first.")
    if len(start) >= 4 and struct.unpack("<i", start[:4])[0] in LLM_C:
        raise DataError(
            f"{key}: {file} has the header of llm.c, which would be read as tokens. Cut it off, as in: tail -c"
            f" +{LLM_C_HEADER + 1} {file} > NEW.bin."
        )
    index = file.with_suffix(".idx")
    if index.is_file():
        with index.open("rb") as stream:
            head = stream.read(len(MEGATRON_INDEX) + 9)
        stored = MEGATRON_DTYPES.get(head[-1], "another dtype") if head.startswith(MEGATRON_INDEX) else bin_dtype
        if stored != bin_dtype and (stored, bin_dtype) != ("int32", "uint32"):
            fitting = {"int32": "uint32"}.get(stored, stored)
            recipe = f"Set data.bin_dtype={fitting}." if fitting in ("uint16", "uint32") else "Save the ids as .npy."
            raise DataError(f"{key}: {file} holds {stored}, says {index.name} of Megatron beside it. {recipe}")

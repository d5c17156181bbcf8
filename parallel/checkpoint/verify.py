"""Verification of a checkpoint: its files have the bytes that were written, and hold what its index says.

The ranks share the files, and a rank hashes several of its own at a time: each file is read once more than a load would
read it, by one rank.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

from parallel.checkpoint.archive import StoredPart, open_safetensors
from parallel.checkpoint.index import OTHER_BYTES, Index
from parallel.checkpoint.newest import PassedOver
from parallel.checkpoint.shared_failure import fail_together
from parallel.checkpoint.tensor_file import DTYPE_NAMES
from parallel.errors import CheckpointError, UnreadableError, shown
from parallel.layout.layout import box_shape
from parallel.mesh.collectives import gather_objects
from parallel.mesh.mesh import Axis
from parallel.regular_file import open_regular

THREADS = 4
"""The files that a rank hashes at a time; hashlib releases Python's lock."""
BLOCK_BYTES = 2**19  # read at a time
SHOWN = 4  # problems in a message


def verify(index: Index, axis: Axis) -> None:
    """Raise CheckpointError unless the contents of a checkpoint are those that were written.

    Every rank of the axis calls this, with the index that it has read, and raises the same error: it names the files,
    or the ranks that see another checkpoint than the first. It is an UnreadableError where none is known to be damaged.
    """
    found: list[PassedOver] = []
    _check_same(index, axis)
    with fail_together(axis):
        files = index.parts_by_file()
        own = sorted(files)[axis.rank :: axis.size]
        if own:
            with ThreadPoolExecutor(min(THREADS, len(own))) as threads:
                problems = threads.map(lambda name: _problem(index, name, files[name]), own)
                found = [problem for problem in problems if problem is not None]
    if all_found := [problem for of_rank in gather_objects(found, axis) for problem in of_rank]:
        more = [f"{len(all_found) - SHOWN} more files are damaged."] if len(all_found) > SHOWN else []
        error = CheckpointError if any(problem.is_damaged for problem in all_found) else UnreadableError
        raise error(" ".join([*(problem.reason for problem in all_found[:SHOWN]), *more]))


def _check_same(index: Index, axis: Axis) -> None:
    """Raise CheckpointError where ranks see different checkpoints: their hosts have file systems of their own."""
    of_ranks = gather_objects((index.folder.name, index.digest), axis)
    if others := [rank for rank, (name, digest) in enumerate(of_ranks) if (name, digest) != of_ranks[0]]:
        seen = "; ".join(
            f"rank {rank} sees {of_ranks[rank][0]} ({of_ranks[rank][1][:8]})" for rank in (0, *others[:SHOWN])
        )
        raise UnreadableError(
            f"{index.folder} is not the same on every rank: {seen}. Put checkpoints where all hosts see the same files."
        )


def _problem(index: Index, name: str, parts: Sequence[StoredPart]) -> PassedOver | None:
    """Return what is wrong with a file, or None."""
    file = index.folder / name
    try:
        with open_regular(file, CheckpointError) as content:
            if _sha256_of(content) != index.sums[name]:
                return PassedOver(file, f"{file} {OTHER_BYTES}")
        text = _header_problem(index, name, parts)
    except CheckpointError as error:
        return PassedOver.by(file, error)
    return PassedOver(file, text) if text else None


def _sha256_of(file: BinaryIO) -> str:
    found = hashlib.sha256()
    while block := file.read(BLOCK_BYTES):
        found.update(block)
    return found.hexdigest()


def _header_problem(index: Index, name: str, parts: Sequence[StoredPart]) -> str:
    """Return how the header of a file differs from the index, or an empty text; safetensors checks its offsets."""
    file, wanted = index.folder / name, {part.key: box_shape(part.box) for part in parts}
    with open_safetensors(file, CheckpointError) as content:
        slices = {key: content.get_slice(key) for key in content.keys()}  # noqa: SIM118 (it is no dict)
        shapes = {key: tuple(found.get_shape()) for key, found in slices.items()}
        dtypes = {found.get_dtype() for found in slices.values()}
    for key, shape in wanted.items():
        if (own := shapes.get(key)) != shape:
            return f"{file} is damaged, or another file: it has {shown(key)} as {own}, and the index as {shape}."
    if not dtypes <= {*DTYPE_NAMES.values()}:
        return f"{file} is damaged: it has values of {', '.join(sorted(dtypes))}."
    return ""

"""The index of a checkpoint: which box of which tensor is in which file, and which bytes each file must have.

checkpoint.json has the first, and SHA256SUMS the second; each file of the folder but SHA256SUMS has a line in it.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from parallel.checkpoint.archive import Archive, StoredPart, StoredTensor
from parallel.checkpoint.synced_file import SUMS
from parallel.errors import CheckpointError, UnreadableError, shown
from parallel.layout.cover import covered_once
from parallel.layout.layout import box_shape
from parallel.layout.sources import Box
from parallel.regular_file import check_regular, parse_json, read_bytes

INDEX = "checkpoint.json"
MOST_BYTES = 2**28
"""The most bytes of an index: that of ten thousand ranks has fewer."""
MOST_DIMS = 64  # of a tensor of torch
MOST_ELEMENTS = 2**62  # of a tensor: an offset in bytes must fit into 64 bits

FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
"""The names of files with tensors: no separator and no leading dot, so that none leaves the folder."""
SUMS_LINE = re.compile(r"(?P<digest>[0-9a-f]{64})  (?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]*)")
OTHER_BYTES = "is damaged, or another file: its bytes are not those that were written."


@dataclass(frozen=True)
class Index:
    """The index of the checkpoint in `folder`: a complete one, whose files are there and have their sizes.

    `sizes` and `sums` have the bytes and the SHA-256 of each file with tensors. `digest` is that of SHA256SUMS, and so
    of the whole checkpoint.
    """

    folder: Path
    metadata: Mapping[str, Any]
    sizes: Mapping[str, int]
    sums: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]
    digest: str

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """Read and check the index of a checkpoint, and look at its files; `verify` reads what is in these.

        Raises CheckpointError, by the name of the file, for one that is missing, damaged, no regular file, or not of
        this checkpoint.
        """
        sums, digest = _read_sums(folder)
        content = read_bytes(folder / INDEX, CheckpointError, at_most=MOST_BYTES)
        if INDEX not in sums:
            raise CheckpointError(f"{folder / SUMS} is damaged: it has no line of {INDEX}.")
        if hashlib.sha256(content).hexdigest() != sums.pop(INDEX):
            raise CheckpointError(f"{folder / INDEX} {OTHER_BYTES}")
        found = parse_json(content, str(folder / INDEX), CheckpointError)
        try:
            metadata, sizes, tensors = _parts_of(found)
            files = {name: folder / name for name in sizes}
            stored = {name: _stored(name, tensor, files) for name, tensor in tensors.items()}
            _check_parts(stored, sizes)
        except ValueError as error:
            raise CheckpointError(f"{folder / INDEX} is damaged: {error}.") from error
        index = cls(folder, metadata, sizes, sums, stored, digest)
        index._check_files()
        return index

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by its name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def archive(self) -> Archive:
        """The tensors, to read from."""
        return Archive(self.folder, self.tensors, CheckpointError)

    def parts_by_file(self) -> dict[str, list[StoredPart]]:
        """Return the parts of tensors in each file; none of a file that has no tensor."""
        found: dict[str, list[StoredPart]] = {name: [] for name in self.sizes}
        for part in _parts(self.tensors):
            found[part.file.name].append(part)
        return found

    def _check_files(self) -> None:
        """Raise CheckpointError unless the folder has just the files that it should have, in their sizes."""
        for name in self.sizes.keys() ^ self.sums.keys():
            problem = f"no line of {name}" if name in self.sizes else f"a line of {name}, which {INDEX} does not name"
            raise CheckpointError(f"{self.folder / SUMS} is damaged: it has {problem}.")
        for name, size in self.sizes.items():
            file = self.folder / name
            if not file.exists() and not file.is_symlink():
                raise CheckpointError(f"{file} is missing.")
            check_regular(file, CheckpointError)
            if (found := file.stat().st_size) != size:
                raise CheckpointError(f"{file} is damaged: it has {found} bytes, was written with {size}.")
        for file in sorted(self.folder.iterdir()):
            is_hidden = file.name.startswith(".")  # file systems and desktops leave such files: .nfs0001, .DS_Store
            if not is_hidden and file.name not in (*self.sizes, INDEX, SUMS):
                raise CheckpointError(f"{file} is no file of this checkpoint: {INDEX} does not name it. Remove it.")


def _read_sums(folder: Path) -> tuple[dict[str, str], str]:
    """Return the SHA-256 of each file of a checkpoint, by its name, and that of the file which has them."""
    file = folder / SUMS
    if not file.exists() and not file.is_symlink() and (folder / INDEX).exists():
        raise UnreadableError(
            f"{file} is missing: an older version has written this checkpoint without it, or it was lost. If you trust"
            f" the files, write it: (cd {folder} && sha256sum {INDEX} *.safetensors > {SUMS})."
        )
    content = read_bytes(file, CheckpointError, at_most=MOST_BYTES)
    lines = [SUMS_LINE.fullmatch(line) for line in content.decode("latin-1").split("\n")[:-1]]
    sums = {line["name"]: line["digest"] for line in lines if line is not None}
    if not lines or len(sums) != len(lines) or not content.endswith(b"\n"):
        raise CheckpointError(f"{file} is damaged: it is not what sha256sum writes.")
    return sums, hashlib.sha256(content).hexdigest()


def _parts_of(index: Any) -> tuple[Mapping[str, Any], Mapping[str, int], Mapping[str, Any]]:
    """Return the metadata, the files' sizes and the tensors of an index. Raises ValueError."""
    if not isinstance(index, dict) or not index.keys() >= {"metadata", "files", "tensors"}:
        raise ValueError("it lacks 'metadata', 'files' or 'tensors'")
    for key in ("metadata", "files", "tensors"):
        if not isinstance(index[key], dict):
            raise ValueError(f"{key!r} is {shown(index[key])}")
    for name, size in index["files"].items():
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"it names the file {shown(name)}, which is no name of a file in its folder")
        if not _is_size(size):
            raise ValueError(f"the size of {name} is {shown(size)}")
    return index["metadata"], index["files"], index["tensors"]


def _stored(name: str, tensor: Any, files: Mapping[str, Path]) -> StoredTensor:
    """Return a tensor of an index. Raises ValueError unless its parts cover it once and are in files of the index."""
    try:
        shape = tuple(tensor["shape"])
        parts = [(part["file"], part["key"], tuple(map(tuple, part["box"]))) for part in tensor["parts"]]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{shown(name)} lacks a shape, or parts with a file, a key and a box") from error
    if len(shape) > MOST_DIMS or not all(map(_is_size, shape)) or prod(shape) > MOST_ELEMENTS:
        raise ValueError(f"the shape of {shown(name)} is {shown(shape)}")
    for file, key, box in parts:
        if not isinstance(file, str) or file not in files or not isinstance(key, str):
            raise ValueError(f"{shown(name)} has a part {shown(key)} in {shown(file)}, which is not among its files")
        if len(box) != len(shape) or not all(len(bounds) == 2 and all(map(_is_size, bounds)) for bounds in box):
            raise ValueError(f"{shown(name)} {shape} has a part with the box {shown(box)}")
    boxes: list[Box] = [box for _, _, box in parts]
    if not covered_once(shape, boxes):
        raise ValueError(f"the parts of {shown(name)} {shape} do not cover it exactly once: {shown(boxes)}")
    return StoredTensor(shape, tuple(StoredPart(files[file], key, box) for file, key, box in parts))


def _check_parts(tensors: Mapping[str, StoredTensor], sizes: Mapping[str, int]) -> None:
    """Raise ValueError where two parts are one tensor of a file, or a file has fewer bytes than its parts elements."""
    left, seen = dict(sizes), set()
    for part in _parts(tensors):
        name = part.file.name
        left[name] -= prod(box_shape(part.box))
        if (name, part.key) in seen:
            raise ValueError(f"two parts are the tensor {shown(part.key)} of {name}")
        if left[name] < 0:
            raise ValueError(f"{name} is to have more elements than bytes")
        seen.add((name, part.key))


def _parts(tensors: Mapping[str, StoredTensor]) -> Iterator[StoredPart]:
    return (part for tensor in tensors.values() for part in tensor.parts)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MOST_ELEMENTS

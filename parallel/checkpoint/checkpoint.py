"""Checkpoints: pieces of public tensors in, pieces out, in whatever layout they are held then.

    runs/NAME/checkpoints/
        step_000100/              checkpoint.json, rank_00000.safetensors, rank_00001.safetensors, ...
        step_000200/
        latest                    the name of the newest

Each rank writes the pieces it owns; the index says which box of which tensor is in which file. A checkpoint appears
under its name only when every rank has written its part. Names of tensors mean nothing here.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parallel.checkpoint.shards import (
    Archive,
    Entry,
    Stored,
    StoredPart,
    covered_once,
    file_bytes,
    read_json,
    replacing,
    together,
    write,
    write_json,
    writing,
)
from parallel.errors import CheckpointError
from parallel.layout.layout import Box, Piece, box_shape
from parallel.mesh.collectives import gather_objects
from parallel.mesh.mesh import Axis

CHECKPOINTS, LATEST, INDEX = "checkpoints", "latest", "checkpoint.json"
STEP_FOLDER = re.compile(r"step_(\d{6,})")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A piece without its data: what every rank learns of the others' pieces."""

    name: str
    shape: tuple[int, ...]
    box: Box
    dtype: torch.dtype

    @property
    def entry(self) -> Entry:
        """Under the tensor's name and the box: a rank may own several boxes of one tensor."""
        where = ",".join(f"{start}:{stop}" for start, stop in self.box)
        return Entry(f"{self.name}[{where}]", box_shape(self.box), self.dtype)


def step_folder(run: Path, step: int) -> Path:
    return run / CHECKPOINTS / f"step_{step:06d}"


def save(folder: Path, pieces: Iterable[Piece], *, metadata: Mapping[str, Any], axis: Axis, keep: int) -> None:
    """Write the pieces that the ranks of `axis` own, each element of each tensor owned by one of them, and `metadata`.

    Then name `folder` the latest and delete all but `keep` checkpoints beside it. If any rank cannot write, every rank
    raises a CheckpointError, and the earlier checkpoints are as they were.
    """
    owned = sorted(pieces, key=lambda piece: -piece.data.element_size())  # as `write` needs them
    mine = [Saved(piece.name, piece.shape, piece.box, piece.data.dtype) for piece in owned]
    saved = gather_objects(mine, axis)
    index = _index(saved, metadata)
    with replacing(folder, axis) as temporary:
        write(temporary / _file_name(axis.rank), [one.entry for one in mine], (piece.data for piece in owned))
        if axis.rank == 0:
            write_json(temporary / INDEX, index)
    with together(axis):
        if axis.rank == 0:
            _name_latest(folder)
            _delete_old(folder, keep)


def _file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _index(saved: list[list[Saved]], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What checkpoint.json says: the size of each file, and the boxes of each tensor. `saved` has a list per rank."""
    tensors: dict[str, dict[str, Any]] = {}
    for rank, ones in enumerate(saved):
        for one in ones:
            tensor = tensors.setdefault(one.name, {"shape": one.shape, "parts": []})
            assert tensor["shape"] == one.shape, f"rank {rank} holds {one.name} as {one.shape}, not {tensor['shape']}"
            tensor["parts"].append({"file": _file_name(rank), "key": one.entry.key, "box": one.box})
    for name, tensor in tensors.items():
        boxes = [part["box"] for part in tensor["parts"]]
        assert covered_once(tensor["shape"], boxes), f"{name} {tensor['shape']} is not owned exactly once: {boxes}"
    files = {_file_name(rank): file_bytes([one.entry for one in ones]) for rank, ones in enumerate(saved)}
    return {"metadata": metadata, "files": files, "tensors": tensors}


def _name_latest(folder: Path) -> None:
    temporary = folder.with_name(f".{LATEST}.incomplete")
    with writing(temporary) as out:
        out.write(f"{folder.name}\n".encode())
    os.replace(temporary, folder.with_name(LATEST))


def _delete_old(newest: Path, keep: int) -> None:
    """Keep the newest and the keep - 1 before it.

    A checkpoint of a later step was left by a run that has since been resumed from an earlier one: it goes first. So
    does what an interrupted save has left.
    """
    others = [folder for folder in _step_folders(newest.parent) if folder.name != newest.name]
    others.sort(key=lambda folder: (_step(folder) < _step(newest), _step(folder)))
    for folder in others[: max(0, len(others) - (keep - 1))]:
        _delete(folder)
    for folder in newest.parent.glob(".step_*"):
        _delete(folder)


def _delete(folder: Path) -> None:
    """What cannot be deleted is in nobody's way."""
    try:
        (folder / INDEX).unlink(missing_ok=True)  # first, so that half of a folder is no checkpoint
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("cannot delete %s: %s", error.filename or folder, error.strerror)


def check(folder: Path) -> None:
    """Raises a CheckpointError that names the file which is missing, or shorter or longer than it was written."""
    for name, size in _read_index(folder)["files"].items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing.")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} is damaged: it has {file.stat().st_size} bytes, was written with {size}.")


def before(folder: Path) -> Path | None:
    """The last checkpoint beside this one of an earlier step."""
    earlier = [one for one in _step_folders(folder.parent) if _is_checkpoint(one) and _step(one) < _step(folder)]
    return max(earlier, key=_step, default=None)


def load(folder: Path, pieces: Iterable[Piece]) -> int:
    """Fill each piece from whatever boxes the files hold, and read nothing else. Returns the bytes read.

    Raises a CheckpointError that names the file or the tensor: missing, damaged, of another shape, or in part only.
    """
    check(folder)
    return Archive(folder, _stored(folder, _read_index(folder)["tensors"]), CheckpointError).fill(pieces)


def _stored(folder: Path, tensors: dict[str, Any]) -> dict[str, Stored]:
    """The tensors of an index, as `Archive` knows them."""
    found = {}
    for name, tensor in tensors.items():
        parts = (
            StoredPart(folder / part["file"], part["key"], tuple(map(tuple, part["box"]))) for part in tensor["parts"]
        )
        found[name] = Stored(tuple(tensor["shape"]), tuple(parts))
    return found


def read_metadata(folder: Path) -> dict[str, Any]:
    """What was saved along with the pieces."""
    metadata: dict[str, Any] = _read_index(folder)["metadata"]
    return metadata


def _read_index(folder: Path) -> dict[str, Any]:
    index = read_json(folder / INDEX, CheckpointError)
    if not isinstance(index, dict) or not index.keys() >= {"metadata", "files", "tensors"}:
        raise CheckpointError(f"{folder / INDEX} is damaged: it lacks 'metadata', 'files' or 'tensors'.")
    return dict(index)


def find(resume: str, run: Path, option: str = "--resume") -> Path | None:
    """The checkpoint that this option means: of this run if 'auto', None if it has none yet; else of a directory.

    The directory may be a run's folder, its checkpoints folder, or a checkpoint.
    """
    if resume == "auto":
        return resolve_latest(run / CHECKPOINTS)
    folder = Path(resume)
    if _is_checkpoint(folder):
        return folder
    found = resolve_latest(folder / CHECKPOINTS) or resolve_latest(folder)
    if found is None:
        problem = "holds no checkpoint" if folder.is_dir() else "is not a directory"
        raise CheckpointError(f"{option}: {folder} {problem}. Try a run's folder, or a checkpoints/step_NNNNNN in it.")
    return found


def resolve_latest(checkpoints: Path) -> Path | None:
    """The checkpoint that `latest` names; if it is gone, the one of the highest step; None if there is none."""
    latest = checkpoints / LATEST
    if latest.is_file():
        named = checkpoints / latest.read_text().strip()
        if _is_checkpoint(named):
            return named
    return max(filter(_is_checkpoint, _step_folders(checkpoints)), key=_step, default=None)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def _step_folders(checkpoints: Path) -> list[Path]:
    return [folder for folder in checkpoints.glob("step_*") if STEP_FOLDER.fullmatch(folder.name) and folder.is_dir()]


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))

"""Checkpoints: ranks write their pieces of public tensors, and read pieces again, in any other layout.

    runs/NAME/checkpoints/
        step_000100/              checkpoint.json, rank_00000.safetensors, rank_00001.safetensors, ..., SHA256SUMS
                                  (a rank with much to write has several: rank_00000-001.safetensors, ...)
        step_000200/
        latest                    the name of the newest checkpoint
        best                      the name of the best one, where a run keeps it

Each rank writes the pieces that it owns. checkpoint.json is the index: which box of which tensor is in which file. A
checkpoint gets its name only after every rank has written its part. This module does not interpret the tensors' names.
"""

import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parallel.checkpoint.index import INDEX, MOST_BYTES, Index
from parallel.checkpoint.rank_files import Reading, SavedPiece, files_of_rank, where_it_is, write_files
from parallel.checkpoint.replaced_folder import replace_folder
from parallel.checkpoint.shared_failure import fail_together
from parallel.checkpoint.synced_file import sync_folder, write_json, write_sums, write_synced
from parallel.checkpoint.tensor_file import DTYPE_NAMES, Entry, file_size
from parallel.errors import CheckpointError
from parallel.layout.cover import covered_once
from parallel.layout.layout import Piece
from parallel.mesh.agreement import Agreement
from parallel.mesh.collectives import gather_objects
from parallel.mesh.mesh import Axis
from parallel.regular_file import check_entered, read_bytes, with_key
from parallel.storage.replaced_file import replacing

CHECKPOINTS, LATEST, BEST = "checkpoints", "latest", "best"
STEP_FOLDER = re.compile(r"step_(\d{6,18})")
FOLDER = re.compile(r"step_(?P<step>\d{6,18})|\.step_(?P<replaced>\d{6,18})\.replaced")
MOST_OF_A_NAME = 100  # bytes of `latest` or `best`

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """The folder of a checkpoint that is to be written, how many are kept there, and which of them is the best."""

    folder: Path
    keep: int
    best: Path | None = None


def step_folder(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps of the run in folder `run`."""
    return run / CHECKPOINTS / f"step_{step:06d}"


def save(
    folder: Path,
    pieces: Iterable[Piece],
    *,
    metadata: Mapping[str, Any],
    axis: Axis,
    keep: int,
    best: Path | None = None,
) -> None:
    """Write the pieces that the ranks of `axis` own, and `metadata`, into `folder`.

    Each element of each tensor is owned by one of these ranks. Afterwards `folder` is the latest checkpoint, and all
    but `keep` checkpoints beside it are deleted, and `best`: the best checkpoint of the run, which may be `folder`, or
    None. If a rank cannot write, every rank raises a CheckpointError, and the earlier checkpoints stay as they were.
    """
    Agreement(axis).agree_on(f"a checkpoint named {folder.name}")
    write(Target(folder, keep, best), list(pieces), metadata=metadata, axis=axis)


def write(
    target: Target,
    pieces: Sequence[Piece],
    *,
    metadata: Mapping[str, Any],
    axis: Axis,
    num_threads: int = 1,
    reading: Reading = where_it_is,
) -> None:
    """Do what `save` does, with several files and threads on each rank, after the ranks have agreed on it. `reading`
    brings a piece to the host when its turn has come; earlier pieces come first.
    """
    folder, best = target.folder, target.best
    files = files_of_rank(pieces, axis.rank, num_threads)
    saved = gather_objects([(file.name, file.saved) for file in files], axis)
    index = _index(saved, metadata)
    with replace_folder(folder, axis, at_last=lambda: _leave(folder, best)) as temporary:
        with fail_together(axis):
            own = write_files(temporary, files, reading)
        sums = {name: digest for part in gather_objects(own, axis) for name, digest in part.items()}
        if axis.rank == 0:
            sums[INDEX] = write_json(temporary / INDEX, index, indent=None, at_most=MOST_BYTES)
            write_sums(temporary, sums)
    with fail_together(axis):
        if axis.rank == 0:
            settle(target)


def settle(target: Target) -> None:
    """Have `latest` and `best` name the checkpoints of a target that is written, and delete those that are not kept.

    It is the end of `write`, on the first rank. A run that was killed before this does it when it goes on.
    """
    folder, best = target.folder, target.best
    _point(folder.with_name(BEST), best if best is not None and _is_checkpoint(best) else None)
    _point(folder.with_name(LATEST), folder)
    _delete_old(folder, target.keep, best)


def has_its_name(folder: Path) -> bool:
    """Return whether a checkpoint has the name of its step, and not the one that it has while it is replaced."""
    return STEP_FOLDER.fullmatch(folder.name) is not None


def _index(saved: list[list[tuple[str, tuple[SavedPiece, ...]]]], metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of checkpoint.json: the size of each file and the boxes of each tensor.

    `saved` has, for each rank, its files with their pieces. Raises CheckpointError for a dtype that cannot be saved.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for rank, files in enumerate(saved):
        for file, piece in ((file, piece) for file, pieces in files for piece in pieces):
            if piece.dtype not in DTYPE_NAMES:
                raise CheckpointError(f"{piece.name}: it is {piece.dtype}, which safetensors cannot hold.")
            tensor = tensors.setdefault(piece.name, {"shape": piece.shape, "parts": []})
            problem = f"rank {rank} has {piece.name} of shape {piece.shape}, and not {tensor['shape']}"
            assert tensor["shape"] == piece.shape, problem
            tensor["parts"].append({"file": file, "key": piece.entry.key, "box": piece.box})
    for name, tensor in tensors.items():
        boxes = [part["box"] for part in tensor["parts"]]
        assert covered_once(tensor["shape"], boxes), f"{name} {tensor['shape']} is not owned exactly once: {boxes}"
    sizes = {file: file_size([piece.entry for piece in pieces]) for files in saved for file, pieces in files}
    return {"metadata": metadata, "files": sizes, "tensors": tensors}


def _point(pointer: Path, folder: Path | None) -> None:
    """Have the file `pointer` name a checkpoint beside it; None: remove it, where there is one."""
    if folder is None:
        if pointer.exists():
            pointer.unlink()
            sync_folder(pointer.parent)
        return
    with replacing(pointer) as temporary, write_synced(temporary) as out:
        out.write(f"{folder.name}\n".encode())
    sync_folder(pointer.parent)


def _leave(folder: Path, best: Path | None) -> None:
    """Have the file `best` not name a checkpoint that another one of its step replaces.

    Between the two there is neither for a moment, and the new one may not be the best.
    """
    pointer = folder.with_name(BEST)
    if named_by(pointer) == folder:
        _point(pointer, best if best is not None and best != folder and _is_checkpoint(best) else None)


def _delete_old(newest: Path, keep: int, best: Path | None) -> None:
    """Delete all checkpoints but the best, the newest, and the keep - 1 before it.

    A checkpoint of a later step was left by a run that has since been resumed from an earlier one: it is deleted first.
    What an interrupted save has left is deleted too.
    """
    others = [folder for folder in _step_folders(newest.parent) if folder.name != newest.name]
    others.sort(key=lambda folder: (step_of(folder) < step_of(newest), step_of(folder)))
    for folder in others[: max(0, len(others) - (keep - 1))]:
        if best is None or folder.name != best.name:
            _delete(folder)
    for folder in newest.parent.glob(".step_*"):
        _delete(folder)


def _delete(folder: Path) -> None:
    """Delete a checkpoint; log a warning if that fails, since the run can go on."""
    try:
        (folder / INDEX).unlink(missing_ok=True)  # first, so that the rest of a folder is not taken for a checkpoint
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("cannot delete %s: %s", error.filename or folder, error.strerror)


def load(folder: Path, pieces: Iterable[Piece]) -> int:
    """Read each piece's data from the boxes that overlap it, and nothing else; return the number of bytes read.

    Raises a CheckpointError that names the file or the tensor if it is missing, of another size or shape, or not
    complete. What is in the files, `verify` has checked before.
    """
    return Index.read(folder).archive.read_into(pieces)


def whole_tensors(index: Index, entries: Iterable[Entry]) -> Iterator[Piece]:
    """Yield the tensors that `entries` name, whole, cast to the entries' dtypes. One of them is in memory at a time.

    Raises CheckpointError as `load` does, before memory is allocated for a tensor that the checkpoint does not have.
    """
    for entry in entries:
        box = tuple((0, size) for size in entry.shape)
        index.archive.check(entry.key, entry.shape)
        piece = Piece(entry.key, entry.shape, box, torch.empty(entry.shape, dtype=entry.dtype))
        index.archive.read_into([piece])
        yield piece


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata that was saved with the pieces."""
    return dict(Index.read(folder).metadata)


def find_checkpoint(resume: str, option: str = "--resume") -> Path:
    """Return the checkpoint that this option names, as far as names go: `Index.read` looks at its files.

    `resume` is a run's folder, its checkpoints folder, a checkpoint, or one of the files that name one:
    checkpoints/best and checkpoints/latest. Of a run it is the newest one. Raises CheckpointError.
    """
    folder = Path(resume)
    check_entered(folder, with_key(CheckpointError, option))
    if _is_checkpoint(folder):
        return folder
    if folder.name in (BEST, LATEST) and folder.is_file():
        if (named := named_by(folder)) is None:
            raise CheckpointError(f"{option}: {folder} names no checkpoint. Try {folder.parent}.")
        return named
    found = resolve_latest(folder / CHECKPOINTS) or resolve_latest(folder)
    if found is None:
        problem = "holds no checkpoint" if folder.is_dir() else "is not a directory"
        raise CheckpointError(
            f"{option}: {folder} {problem}. Try the folder of a run that has saved one (output.checkpoint_every), or"
            " a checkpoints/step_NNNNNN in it."
        )
    return found


def resolve_latest(checkpoints: Path) -> Path | None:
    """Return the checkpoint that the file `latest` names; if there is none, that of the highest step; else None."""
    return next(filter(_is_checkpoint, candidates(checkpoints)), None)


def candidates(checkpoints: Path) -> list[Path]:
    """Return the folders that were checkpoints when they were complete, whatever they are now, the newest first.

    The newest is the one that `latest` names. Those of later steps are of a run that has since been resumed from an
    earlier one: they come last. Where `latest` names none, the highest step is the newest. A checkpoint that another
    one of its step was about to replace may have a name that begins with a dot, and be the only one of its step.
    """
    found = [folder for folder in checkpoints.glob("*step_*") if FOLDER.fullmatch(folder.name) and folder.is_dir()]
    found.sort(key=lambda folder: (step_of(folder), not folder.name.startswith(".")), reverse=True)
    latest = _name_in(checkpoints / LATEST)
    named = [folder for folder in found if latest is not None and folder.name in (latest, replaced_name(latest))]
    newest = max(map(step_of, named), default=None)
    return sorted(found, key=lambda folder: newest is not None and step_of(folder) > newest)


def best_checkpoint(run: Path) -> Path | None:
    """Return the checkpoint that the file `best` of the run in this folder names, or None."""
    return named_by(run / CHECKPOINTS / BEST)


def named_by(pointer: Path) -> Path | None:
    """Return the checkpoint that a file, `latest` or `best`, names; None where there is no file or no checkpoint."""
    name = _name_in(pointer)
    named = None if name is None else pointer.with_name(name)
    return named if named is not None and _is_checkpoint(named) else None


def _name_in(pointer: Path) -> str | None:
    """Return the name of a checkpoint that is in a file, `latest` or `best`; None where it has none."""
    try:
        name = read_bytes(pointer, CheckpointError, at_most=MOST_OF_A_NAME).decode("ascii").strip()
    except (CheckpointError, UnicodeDecodeError):
        return None
    return name if STEP_FOLDER.fullmatch(name) else None


def replaced_name(name: str) -> str:
    """Return the name that a checkpoint has while another one of its step replaces it."""
    return f".{name}.replaced"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint, by its name; -1 for another name."""
    found = FOLDER.fullmatch(folder.name)
    return int(found["step"] or found["replaced"]) if found else -1


def _is_checkpoint(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def _step_folders(checkpoints: Path) -> list[Path]:
    return [folder for folder in checkpoints.glob("step_*") if STEP_FOLDER.fullmatch(folder.name) and folder.is_dir()]

"""The sources that `data.path` and `data.validation_path` name: files of one kind, in the order of their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from parallel.errors import DataError, closest, names_text
from parallel.regular_file import check_regular, is_missing, read_json, with_key

BUILT_IN = "python-docs"
PATH = "data.path"
MOST_BYTES = 1 << 24  # of a file that describes others


class Kind(StrEnum):
    """The kinds of data that are read; the value is what a message calls them."""

    BUILT_IN = "the built-in text"
    TEXT = "texts"
    LINES = "records in lines"
    PARQUET = "Parquet"
    DATASET = "a saved dataset"
    BIN = "token ids without a header"
    NPY = "arrays of token ids"

    @property
    def has_records(self) -> bool:
        return self in (Kind.LINES, Kind.PARQUET, Kind.DATASET)

    @property
    def has_ids(self) -> bool:
        return self in (Kind.BIN, Kind.NPY)


SUFFIXES = {
    ".txt": Kind.TEXT,
    ".jsonl": Kind.LINES,
    ".jsonl.gz": Kind.LINES,
    ".parquet": Kind.PARQUET,
    ".bin": Kind.BIN,
    ".npy": Kind.NPY,
}
"""The ends of the names of files that are read, also in a folder."""

LONE_SUFFIXES = {**SUFFIXES, ".json": Kind.LINES, ".json.gz": Kind.LINES}
"""The ends of the names of files that are read where they are named: in a folder a .json is often about other files."""

RECIPES = {
    ".csv": "Convert it: datasets.load_dataset('csv', data_files=FILE)['train'].to_json('FILE.jsonl').",
    ".tsv": "Convert it: datasets.load_dataset('csv', data_files=FILE, sep='\\t')['train'].to_json('FILE.jsonl').",
    ".arrow": "Name the folder that datasets.save_to_disk wrote, with state.json in it.",
    ".gz": "Unpack it: gunzip FILE.",
    ".zst": "Unpack it: zstd -d FILE.",
    ".zip": "Unpack it: unzip FILE.",
    ".idx": "Name the FILE.bin beside it.",
    ".npz": "Save one array by numpy.save.",
    ".pt": "Save the ids by numpy.save('FILE.npy', ids.numpy()).",
    ".pkl": "Save the ids by numpy.save, or records as .jsonl.",
}
KINDS_TEXT = "FILE.txt, FILE.jsonl(.gz), FILE.parquet, FILE.bin, FILE.npy, a folder of one of these kinds"
SPLITS = re.compile(r"(?P<train>train|training)|val|valid|validation|dev|test|eval", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """The files that a key of the config names, sorted by name, and messages about what else is there.

    `path` is what the key says. The files of a saved dataset are its data and what describes them.
    """

    key: str
    path: str
    kind: Kind
    files: tuple[Path, ...] = ()
    messages: tuple[str, ...] = ()


def find_source(path: str, key: str = PATH) -> Source:
    """Return what `path`, the value of this key of the config, names. Raises DataError where it cannot be read."""
    named = Path(path)
    if path == BUILT_IN:
        other = (f"the built-in {path} is read, not what has its name here: ./{path} names the other",)
        return Source(key, path, Kind.BUILT_IN, messages=other if named.exists() else ())
    if is_missing(named):
        match = closest(named.name.strip(), names_in(named.parent, key))
        hint = f" Did you mean {str(named.with_name(match))!r}?" if match else ""
        raise DataError(f"{key}: {path} does not exist.{hint} Name a {KINDS_TEXT}, or {BUILT_IN!r}.")
    if named.is_dir():
        return _saved_dataset(named, key) or _folder(named, key)
    return Source(key, path, _kind_of(named, key), (named,))


def has_token_ids(path: str) -> bool:
    """Return whether data of this path are token ids: by the end of its name, else by what is there.

    So a file may be gone by now. Raises DataError where a folder is.
    """
    kind = next((kind for suffix, kind in LONE_SUFFIXES.items() if path.endswith(suffix)), None)
    if kind is None or Path(path).is_dir():
        kind = find_source(path).kind
    return kind.has_ids


def names_in(folder: Path, key: str) -> list[str]:
    """Return the names of what a folder holds, sorted; none where it is no folder."""
    try:
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise DataError(f"{key}: cannot read {folder}: {error.strerror}.") from error


def _kind_of(file: Path, key: str) -> Kind:
    kind = next((kind for suffix, kind in LONE_SUFFIXES.items() if file.name.endswith(suffix)), None)
    if kind is None:
        recipe = RECIPES.get(file.suffix.lower(), "Rename it, or convert it to one of them.")
        raise DataError(f"{key}: {file} is not of a kind that is read: {', '.join(SUFFIXES)}. {recipe}")
    check_regular(file, with_key(DataError, key), links=True)
    return kind


def _saved_dataset(folder: Path, key: str) -> Source | None:
    """Return the dataset that `datasets.save_to_disk` wrote into this folder, None where there is none."""
    names = names_in(folder, key)
    if "dataset_dict.json" in names:
        splits = _splits_of(folder)
        train = "train" if "train" in splits or not splits else splits[0]
        others = [split for split in splits if split != train]
        validation = f", and data.validation_path={folder / others[0]}" if others and key == PATH else ""
        raise DataError(
            f"{key}: {folder} has several datasets: {names_text(splits)}. Name one: {key}={folder / train}{validation}."
        )
    if "state.json" not in names or "dataset_info.json" not in names:
        return None
    own = (name for name in names if not name.startswith("cache-"))  # `datasets` keeps results of its own beside them
    files = tuple(folder / name for name in own if not (folder / name).is_dir())
    for file in files:
        check_regular(file, with_key(DataError, key), links=True)
    return Source(key, str(folder), Kind.DATASET, files)


def _splits_of(folder: Path) -> list[str]:
    try:
        content = read_json(folder / "dataset_dict.json", DataError, at_most=MOST_BYTES, links=True)
        return [str(split) for split in content["splits"]]
    except (DataError, KeyError, TypeError):
        return [path.name for path in sorted(folder.iterdir()) if path.is_dir()]


def _folder(folder: Path, key: str) -> Source:
    """Return the files of a folder that are of one kind; a message names what else is there."""
    names = [name for name in names_in(folder, key) if not name.startswith(".")]
    suffixes = {name: suffix for name in names if (suffix := _suffix_of(folder / name)) is not None}
    kinds = {SUFFIXES[suffix]: name for name, suffix in suffixes.items()}
    if not suffixes:
        ends = {Path(name).suffix.lower() for name in names}
        recipe = next((RECIPES[end] for end in sorted(ends & {*RECIPES})), "Name a folder of one of these, or a file.")
        raise DataError(
            f"{key}: the folder {folder} has no *.txt in it, and no {', '.join(list(SUFFIXES)[1:])}:"
            f" {f'it has {names_text(names)}' if names else 'it is empty'}. {recipe}"
        )
    if len(kinds) > 1:
        raise DataError(
            f"{key}: the folder {folder} has files of several kinds: {', '.join(kinds.values())}. Name a file, or a"
            " folder of one kind."
        )
    for name in suffixes:
        check_regular(folder / name, with_key(DataError, key), links=True)
    _refuse_splits(folder, list(suffixes), key)
    (kind,), read = kinds, " or ".join(f"*{suffix}" for suffix in SUFFIXES if suffix in suffixes.values())
    others = [name for name in names if name not in suffixes]
    message = f"not read, since only files {read} of the folder itself are: {names_text(others)}"
    files = tuple(folder / name for name in suffixes)
    return Source(key, str(folder), kind, files, (message,) if others else ())


def _suffix_of(file: Path) -> str | None:
    """Return the end of the name of a file that is read, None for another one."""
    return None if file.is_dir() else next((suffix for suffix in SUFFIXES if file.name.endswith(suffix)), None)


def _refuse_splits(folder: Path, names: Sequence[str], key: str) -> None:
    """Raise DataError for a folder that holds a training split and others: it would be trained on all of them."""
    splits = dict(_split_names(names))
    train = next((name for name, is_train in splits.items() if is_train), None)
    other = next((name for name, is_train in splits.items() if not is_train), None)
    if train and other:
        raise DataError(
            f"{key}: the folder {folder} has {train} and {other}, which are different splits by their names. Name the"
            f" files, data.path={folder / train} data.validation_path={folder / other}, or a folder for each split."
        )


def _split_names(names: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Yield the names that begin with the name of a split, and whether it is that of training."""
    for name in names:
        found = SPLITS.fullmatch(re.split(r"[-_.]", name)[0])
        if found is not None:
            yield name, found["train"] is not None

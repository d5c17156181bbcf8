"""A folder that `datasets.save_to_disk` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.data.sources import MOST_BYTES, Source
from parallel.errors import DataError, shown
from parallel.regular_file import printable, read_json, with_key

INFO, STATE = "dataset_info.json", "state.json"


def load_dataset(source: Source) -> Any:
    """Return the dataset in a folder, mapped from its files. Raises DataError."""
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise DataError(f"{source.key}: {source.path} needs the package 'datasets': pip install datasets.") from error
    if not any(file.suffix == ".arrow" for file in source.files):
        raise DataError(f"{source.key}: {source.path} is empty: a dataset without rows. Name another one.")
    _check_names(source)
    try:
        return datasets.Dataset.load_from_disk(source.path, keep_in_memory=False)
    except Exception as error:  # a damaged folder raises what its reader meets
        raise DataError(
            f"{source.key}: {source.path} is not a folder that datasets.save_to_disk wrote, or is damaged:"
            f" {printable(str(error))}"
        ) from error


def _check_names(source: Source) -> None:
    """Raise DataError unless the files that the folder's description names are in the folder."""
    folder, error = Path(source.path), with_key(DataError, source.key)
    read_json(folder / INFO, error, at_most=MOST_BYTES, links=True)
    state = read_json(folder / STATE, error, at_most=MOST_BYTES, links=True)
    listed = state.get("_data_files") if isinstance(state, dict) else None
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise error(f"{folder / STATE} is damaged: it has no list of '_data_files'.")
    there = {file.name for file in source.files}
    for name in (entry.get("filename") for entry in listed):
        if name not in there:
            raise error(f"{folder / STATE} names {shown(name)}, which is no file beside it. Save the dataset again.")

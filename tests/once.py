"""Measure something once for all workers of a run of the tests."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

T = TypeVar("T")

FOLDER = "COLONNADE_SHARED_BY_TESTS"
"""The variable with the folder that all workers of a run share; conftest.py sets it, and removes the folder."""


def once(name: str, work: Callable[[], T]) -> T:
    """Return what `work` returns, which the first worker that asks for this name calls. Others wait for it."""
    file = Path(os.environ[FOLDER], f"{name}.pickle")
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_bytes(pickle.dumps(work()))
        found: Any = pickle.loads(file.read_bytes())
    return found  # type: ignore[no-any-return]

"""Files that hold token ids, mapped into memory."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.tokenizer import Ids
from parallel.errors import DataError


def read_token_file(file: Path) -> Ids:
    """Return a 1-d array of token ids, mapped into memory."""
    if not file.is_file():
        raise DataError(f"data.path: there is no file {file}. Name a 1-d array of token ids, as numpy.save writes it.")
    try:
        tokens: npt.NDArray[Any] = np.lib.format.open_memmap(file, mode="r")
    except OSError as error:
        raise DataError(f"data.path: cannot read {file}: {error.strerror}.") from error
    except ValueError as error:
        raise DataError(f"data.path: {file} is not an array that numpy can memory-map: {error}") from error
    if tokens.ndim != 1:
        raise DataError(f"data.path: {file} has {tokens.ndim} dimensions, {tokens.shape}, not 1. Save it flattened.")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(f"data.path: {file} holds {tokens.dtype}, not token ids. Save it as an integer type.")
    return tokens

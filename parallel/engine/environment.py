"""Environment variables that are set for the time of a block."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def environment_variables(**variables: str) -> Iterator[None]:
    """Set these variables for the time of the block, for other libraries to read; then restore what there was."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

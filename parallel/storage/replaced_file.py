"""A file that is replaced whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(file: Path, writer: object = "") -> Iterator[Path]:
    """Provide a temporary file beside `file`, which replaces it at the end of the block.

    If the block fails, the temporary file is removed and `file` stays as it was. Where several processes may write at
    the same time, `writer` is what tells them apart. What must outlive a failure of the host is synced in the block.
    """
    temporary = file.with_name(f".{file.name}.{writer}.incomplete" if writer != "" else f".{file.name}.incomplete")
    temporary.unlink(missing_ok=True)  # of a process that was killed; a link would lead elsewhere
    try:
        yield temporary
        temporary.replace(file)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise

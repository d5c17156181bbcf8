"""Files that a user names, opened only if they are regular files, and read only as far as they may be large.

To open a pipe waits for ever, a device has no end, and a link may lead out of a folder. So every file is looked at
before it is opened, and once more afterwards, and no more is allocated for its content than its own size.
"""

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

from parallel.errors import ColonnadeError, shortened, shown, size_text

MakeError: TypeAlias = Callable[[str], ColonnadeError]
"""It makes the error of a message: a class of errors, or a function that puts the key of a config before it."""

MOST_JSON = 1 << 30  # bytes: an index of a checkpoint that a thousand ranks have written
MOST_NESTED = 200  # lists and objects of JSON in one another
CONTAINERS = (dict, list)
FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY

OPENED = re.compile(r"/dev/(stdin|fd/\d+)|/proc/self/fd/\d+")
"""Names of what a shell has opened for a process, such as a pipe from another one."""

KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def is_missing(file: Path) -> bool:
    """Return whether nothing has this name. False where a folder cannot be entered: to read the file says why."""
    try:
        os.lstat(file)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last one: no file can have this name
        return True
    except OSError:
        return False
    return False


def without_links(path: str | Path) -> Path:
    """Return the absolute path that this one leads to. Where links lead in a circle it is left as it is from there on:
    `Path.resolve` raises RuntimeError in some versions of Python, and to use the path says what is wrong.
    """
    return Path(os.path.realpath(path))


def check_entered(folder: Path, error: MakeError) -> None:
    """Raise `error` where a folder may not be entered, so that nobody knows what is in it. It may be missing."""
    try:
        os.stat(os.path.join(folder, os.curdir))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as cause:
        raise error(f"cannot read {_name(folder)}: {cause.strerror}.") from cause


def check_regular(file: Path, error: MakeError, *, links: bool = False) -> None:
    """Raise `error` unless this is a regular file, or, where `links` are allowed, a link to one. It is not opened."""
    with _naming(file, error):
        try:
            status = os.stat(file) if links else os.lstat(file)
        except ValueError as cause:  # it has the character NUL, or half of a surrogate pair
            raise error(f"{_name(file)} is no name that a file can have.") from cause
    _check(file, status, error)


@contextmanager
def open_regular(file: Path, error: MakeError, *, links: bool = False) -> Iterator[BufferedReader]:
    """Open a regular file to read from. Problems with it, also with reading it in the block, are raised as `error`."""
    check_regular(file, error, links=links)
    with _naming(file, error):
        descriptor = os.open(file, FLAGS if links else FLAGS | os.O_NOFOLLOW)
        with open(descriptor, "rb") as stream:
            _check(file, os.fstat(descriptor), error)  # another one may have its name by now
            yield stream


def read_bytes(file: Path, error: MakeError, *, at_most: int, links: bool = False) -> bytes:
    """Return the content of a regular file of at most so many bytes. Problems with it are raised as `error`."""
    with open_regular(file, error, links=links) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > at_most:
            raise error(f"{_name(file)} has {size_text(size)}, more than the {size_text(at_most)} that it may have.")
        content = stream.read(size + 1)
        if len(content) != size:
            raise error(f"{_name(file)} has changed while it was read, or is no file with a size: {size} bytes.")
        return content


def read_input(file: Path, error: MakeError, *, at_most: int) -> bytes:
    """Return the content of a file of at most so many bytes, which may be what a shell has opened: /dev/stdin, a pipe.

    Problems with it are raised as `error`.
    """
    if not OPENED.fullmatch(str(file)):
        return read_bytes(file, error, at_most=at_most, links=True)
    with _naming(file, error), file.open("rb") as stream:
        content = stream.read(at_most + 1)
    if len(content) > at_most:
        raise error(f"{file} has more than the {size_text(at_most)} that it may have.")
    return content


def with_key(error: type[ColonnadeError], key: str) -> MakeError:
    """Return what makes an error of a message about the value of a key of the config, or of an option."""
    return lambda text: error(f"{key}: {text}")


def read_json(file: Path, error: MakeError, *, at_most: int = MOST_JSON, links: bool = False) -> Any:
    """Return the content of a JSON file. Problems with it are raised as `error`, and so is what only Python reads."""
    return parse_json(read_bytes(file, error, at_most=at_most, links=links), _name(file), error)


def parse_json(content: bytes, name: str, error: MakeError) -> Any:
    """Return the value of JSON, which is called `name` in a message.

    NaN and infinities, a key that an object has twice, and values that are nested deep are raised as `error`.
    """
    try:
        value = json.loads(content, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except RecursionError as cause:
        raise error(f"{name} is damaged: its values are nested too deep.") from cause
    except ValueError as cause:
        raise error(f"{name} is damaged, or it is not JSON: {shortened(str(cause))}.") from cause
    if not _is_flat(value):
        raise error(f"{name} is damaged: its values are nested too deep, in more than {MOST_NESTED} levels.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it has {name}, which is no number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"an object has the key {shown(key)} twice")
    return found


def _is_flat(value: object) -> bool:
    """Return whether a value of JSON has at most MOST_NESTED levels: containers are opened level by level."""
    level: list[Any] = [value] if isinstance(value, CONTAINERS) else []
    for _ in range(MOST_NESTED):
        opened = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [inner for items in opened for inner in items if isinstance(inner, CONTAINERS)]
        if not level:
            return True
    return False


def _check(file: Path, status: os.stat_result, error: MakeError) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFLNK:
        raise error(f"{_name(file)} is a link, to {_name(Path(os.readlink(file)))}, and not the file itself.")
    if kind != stat.S_IFREG:
        raise error(f"{_name(file)} is {KINDS.get(kind, 'something else')}, and not a regular file.")


@contextmanager
def _naming(file: Path, error: MakeError) -> Iterator[None]:
    """Have an OSError in the block raised as `error`."""
    try:
        yield
    except OSError as cause:
        if isinstance(cause, FileNotFoundError) and file.is_symlink():
            target = _name(Path(os.readlink(file)))
            raise error(f"{_name(file)} is a link to {target}, which does not exist.") from cause
        if isinstance(cause, FileNotFoundError):
            raise error(f"{_name(file)} does not exist.") from cause
        raise error(f"cannot read {_name(file)}: {cause.strerror}.") from cause


def printable(text: str) -> str:
    """Return a text on one line: what cannot be printed in it, such as a line end, is written as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _name(file: Path) -> str:
    return shortened(printable(str(file)))

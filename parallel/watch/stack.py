"""A look at what the threads of this process are doing, from another thread: it costs them nothing."""

import sys
import sysconfig
import threading
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

WAITING = ("parallel/mesh/collectives.py", "parallel/pipeline/p2p.py", "torch/distributed/distributed_c10d.py")
"""The ends of the paths of files whose functions wait for other ranks."""

COMPILING = ("torch/_dynamo/convert_frame.py", "torch/_inductor/compile_fx.py")
"""The ends of the paths of files that are on the stack while torch's compiler works."""

OWN = str(Path(__file__).parents[1])
LIBRARIES = tuple(dict.fromkeys([*(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), OWN]))
"""The folders whose files are not the user's program."""


@dataclass(frozen=True)
class Sight:
    """The state of the threads of a process.

    `waits`: one of them waits in a collective; in stage 3 that may be a thread of autograd. `waits_apart`: one of those
    that work apart from the main thread does. `compiles`: the main thread is in torch's compiler. `place`: the
    innermost line of the user's program there. `instruction` changes whenever the main thread executes any Python.
    """

    waits: bool
    waits_apart: bool
    compiles: bool
    place: str
    instruction: tuple[int, int]


def look(main: int, apart: Collection[int] = ()) -> Sight:
    """Return what the threads of this process do, but for the calling one.

    `main` is the ident of the main thread, and `apart` are those of the threads that work apart from it.
    """
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    top = frames.get(main)
    stack = _stack(top)
    waiting = {ident for ident, frame in frames.items() if _is_in(_stack(frame), WAITING)}
    return Sight(
        waits=not waiting <= set(apart),
        waits_apart=not waiting.isdisjoint(apart),
        compiles=_is_in(stack, COMPILING),
        place=next((_line(frame) for frame in stack if _is_users(frame)), ""),
        instruction=(id(top.f_code), top.f_lasti) if top is not None else (0, 0),
    )


def _stack(frame: FrameType | None) -> list[FrameType]:
    """Return the frame and its callers, the innermost first."""
    found = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def _is_in(stack: Iterable[FrameType], files: tuple[str, ...]) -> bool:
    """Return whether one of the frames is of a function in these files."""
    return any(frame.f_code.co_filename.endswith(files) for frame in stack)


def place_of(frame: FrameType) -> str:
    """Return the line of a frame, and the innermost line of the user's program below it: ' at sum.py:3 in f, ...'."""
    users = next((one for one in _stack(frame) if _is_users(one)), None)
    called_from = f", called at {_line(users)}" if users is not None and users is not frame else ""
    return f" at {_line(frame)}{called_from}"


def _is_users(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return not file.startswith(LIBRARIES) and not file.startswith("<")


def _line(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"

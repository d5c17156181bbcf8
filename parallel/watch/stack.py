"""A look at what the threads of this process are doing, from another thread: it costs them nothing."""

import sys
import sysconfig
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

WAITING = ("parallel/mesh/collectives.py", "parallel/pipeline/p2p.py", "torch/distributed/distributed_c10d.py")
"""The ends of the paths of files whose functions wait for other ranks."""

COMPILING = ("torch/_dynamo/convert_frame.py", "torch/_inductor/compile_fx.py")
"""The ends of the paths of files that are on the stack while torch's compiler works."""

BACKGROUND = ("parallel/checkpoint/saver.py",)
"""The ends of the paths of files that are on the stack of a thread which works beside the main thread."""

FOR_BACKGROUND = (*BACKGROUND, "parallel/chunk/guard.py")
"""The ends of the paths of files that are on the main thread's stack while it waits for such a thread."""

OWN = str(Path(__file__).parents[1])
LIBRARIES = tuple(dict.fromkeys([*(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), OWN]))
"""The folders whose files are not the user's program."""


@dataclass(frozen=True)
class Sight:
    """The state of the threads of a process.

    `waits`: one of them waits in a collective; in stage 3 that may be a thread of autograd. A thread that saves in the
    background counts only while the main thread waits for it. `compiles`: the main thread
    is in torch's compiler. `place`: the innermost line of the user's program there. `instruction` changes whenever the
    main thread executes any Python.
    """

    waits: bool
    compiles: bool
    place: str
    instruction: tuple[int, int]


def look(main: int) -> Sight:
    """Return what the threads of this process do, but for the calling one; `main` is the ident of the main thread."""
    frames = sys._current_frames()
    frames.pop(threading.get_ident(), None)
    top = frames.get(main)
    stack = _stack(top)
    stacks = [stack, *(_stack(frame) for ident, frame in frames.items() if ident != main)]
    if not _is_in(stack, FOR_BACKGROUND):
        stacks = [stack, *(other for other in stacks[1:] if not _is_in(other, BACKGROUND))]
    return Sight(
        waits=any(_is_in(one, WAITING) for one in stacks),
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


def _is_in(stack: list[FrameType], files: tuple[str, ...]) -> bool:
    """Return whether a function of one of these files is on a stack."""
    return any(frame.f_code.co_filename.endswith(files) for frame in stack)


def _is_users(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return not file.startswith(LIBRARIES) and not file.startswith("<")


def _line(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"

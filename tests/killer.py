"""A callback that sends its own rank a signal at a chosen call of a function: a kill that can be repeated exactly.

A run names it as `output.callbacks=('tests/killer.py:Killer',)`, by its absolute path. It reads the file kill.json
beside the run's folder, acts on it once, and renames it to killed.json just before.
"""

import json
import os
import signal
import sys
import threading
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType

from training.callbacks import Callback, Run

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = tuple(f"{ROOT / name}{os.sep}" for name in ("parallel", "models", "training"))


@dataclass(frozen=True)
class Kill:
    """A signal to `rank`, when it calls `function` for the `call`-th time since the run or its resumption began.

    `function` is a qualified name, such as "Runner._backward", of a function of this project; "" is any of them. Calls
    on the main thread count, or with `in_background` those on all other threads. With `all_ranks` the rank sends
    SIGKILL to the others first.
    """

    rank: int
    function: str = ""
    call: int = 1
    signal: int = signal.SIGKILL
    all_ranks: bool = False
    in_background: bool = False

    def __str__(self) -> str:
        who = "all ranks" if self.all_ranks else f"rank {self.rank}"
        where = " in the background" if self.in_background else ""
        function = self.function or "any function"
        return f"{signal.Signals(self.signal).name} to {who} at call {self.call} of {function}{where}"

    def write(self, run: Path) -> None:
        """Have the next start of the run in this folder be killed so."""
        killed_file(run).unlink(missing_ok=True)
        temporary = kill_file(run).with_suffix(".new")
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(kill_file(run))


def kill_file(run: Path) -> Path:
    """Return the file of the kill that is still to come."""
    return run.with_name(f"{run.name}.kill.json")


def killed_file(run: Path) -> Path:
    """Return the file that says that the kill has come."""
    return run.with_name(f"{run.name}.killed.json")


def calls_folder(run: Path) -> Path:
    """Return the folder in which ranks write how often they called each function, where it is there."""
    return run.with_name(f"{run.name}.calls")


class Killer(Callback):
    """Kills the rank that kill.json names, and counts the calls of functions where a folder for that is there.

    It sees each call of a Python function on every thread that begins after it.
    """

    on_every_rank = True

    def __init__(self) -> None:
        self._kill: Kill | None = None
        self._calls: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}  # on the main thread; on others
        self._ours: dict[CodeType, bool] = {}

    def on_start(self, run: Run) -> None:
        self._run, self._rank = run.folder, run.rank
        pids = run.folder.with_name(f"{run.folder.name}.pids")
        pids.mkdir(exist_ok=True)
        (pids / f"{run.rank}").write_text(str(os.getpid()))
        self._pids = pids
        if kill_file(run.folder).exists():
            kill = Kill(**json.loads(kill_file(run.folder).read_text()))
            self._kill = kill if kill.rank == run.rank else None
        if self._kill is not None or calls_folder(run.folder).exists():
            threading.settrace(self._on_call)
            sys.settrace(self._on_call)

    def on_end(self, error: BaseException | None) -> None:
        sys.settrace(None)
        threading.settrace(None)
        if calls_folder(self._run).exists():
            for in_background, calls in self._calls.items():
                name = f"{'background' if in_background else 'main'}_{self._rank}.json"
                (calls_folder(self._run) / name).write_text(json.dumps(calls))

    def _on_call(self, frame: FrameType, event: str, argument: object) -> None:
        """Count a call; None as the result asks for no further event of this frame."""
        code = frame.f_code
        if code not in self._ours:
            self._ours[code] = code.co_filename.startswith(PACKAGES)
        if not self._ours[code]:
            return
        in_background = threading.current_thread() is not threading.main_thread()
        calls, kill = self._calls[in_background], self._kill
        calls[code.co_qualname] += 1
        if kill is None or kill.in_background is not in_background or kill.function not in ("", code.co_qualname):
            return
        if kill.call == (calls[kill.function] if kill.function else calls.total()):
            self._act(kill)

    def _act(self, kill: Kill) -> None:
        self._kill = None
        kill_file(self._run).replace(killed_file(self._run))
        if kill.all_ranks:
            for file in self._pids.iterdir():
                if int(file.name) != self._rank:
                    os.kill(int(file.read_text()), signal.SIGKILL)
        os.kill(os.getpid(), kill.signal)

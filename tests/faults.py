"""Faults of one rank of a real run, at a drawn moment of a phase: it is stopped, or does something that has no end.

A config file that `faulty_config` writes arms the fault, since every rank executes it. `Run` is such a run, started
by `--nprocs` or by torchrun, and measures when the fault was named and when the last process was gone.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from tests.patience import LIMIT, patient, wait_until

ROOT = Path(__file__).parents[1]
PHASES = ("forward", "backward", "reduce", "save", "evaluate", "export")
OTHERS = ("data", "load")
TIMEOUT = 5  # train.timeout_seconds

CONFIG = """
from tests.faults import arm as _arm
_arm({fault!r}, {phase!r}, rank={rank}, delay={delay}, folder={folder!r})
model = dict(name="opt-tiny", hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2)
data = dict(path={text!r}, tokenizer="bytes", sequence_length=32, validation_fraction=0.2)
parallel = {parallel}
train = dict(device={device!r}, steps=6, global_batch_size=8, micro_batch_size=2, timeout_seconds={timeout})
output = dict(dir={run!r}, checkpoint_every=2, eval_every=2)
"""


def arm(fault: str, phase: str, *, rank: int, delay: float, folder: str) -> None:
    """Have this process, if it is that rank of a run, commit the fault so many seconds after the phase has begun.

    Every rank leaves its process id in the folder. A negative rank: the one that comes to the phase, which one does.
    """
    if "RANK" not in os.environ:
        return
    Path(folder, f"rank_{os.environ['RANK']}").write_text(str(os.getpid()))
    if int(os.environ["RANK"]) == rank or rank < 0:
        owner, name = _function_of(phase)
        setattr(owner, name, _with_fault(getattr(owner, name), phase, FAULTS[fault], delay, Path(folder)))


def _function_of(phase: str) -> tuple[Any, str]:
    """Return the object and the name of the function that begins a phase."""
    from models.data.cache import Cache
    from parallel.checkpoint import checkpoint
    from parallel.checkpoint.archive import Archive
    from parallel.engine.engine import Engine
    from parallel.engine.phases import Stopwatch
    from training import artifacts

    places = {
        "data": (Cache, "_make"),
        "load": (Archive, "read_into"),
        "save": (checkpoint, "write"),
        "evaluate": (Engine, "evaluate"),
        "export": (artifacts, "export"),
    }
    return places.get(phase, (Stopwatch, "mark"))


def _with_fault(
    function: Callable[..., Any], phase: str, fault: "Fault", delay: float, folder: Path
) -> Callable[..., Any]:
    calls = [0]

    @wraps(function)
    def called(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += phase in arguments or phase in ("data", "load", "save", "evaluate", "export")
        if calls[0] == (3 if phase in ("forward", "backward", "reduce") else 1):
            calls[0] += 100
            if fault.in_main_thread:
                _commit(fault, folder)
            else:
                threading.Timer(delay, _commit, (fault, folder)).start()
        return function(*arguments, **keywords)

    return called


def _commit(fault: "Fault", folder: Path) -> None:
    """Commit the fault, unless a rank has; one that goes on in the place of that rank is to go on."""
    with suppress(FileExistsError):
        (folder / "faulty").touch(exist_ok=False)
        fault.act()


@dataclass(frozen=True)
class Fault:
    """The act of a rank that goes wrong, in its main thread or in another one that interrupts it."""

    act: Callable[[], object]
    in_main_thread: bool


def loop_for_ever() -> None:
    while True:
        pass


def wait_for_a_lock_that_it_holds() -> None:
    lock = threading.Lock()
    with lock:
        lock.acquire(timeout=LIMIT)


def hold_the_interpreter() -> None:
    """Call C code that runs for minutes and does not let another thread of Python run."""
    sum(range(10**11))


def load_from_a_hanging_dataset() -> None:
    from torch.utils.data import DataLoader

    next(iter(DataLoader(Hanging(), num_workers=1)))  # type: ignore[arg-type]


class Hanging:
    """A dataset whose first sample never comes."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        time.sleep(LIMIT)
        return index


def meet_in_another_group() -> None:
    import torch.distributed as dist

    dist.barrier()


FAULTS = {
    "kill": Fault(lambda: os.kill(os.getpid(), signal.SIGKILL), in_main_thread=False),
    "stop": Fault(lambda: os.kill(os.getpid(), signal.SIGSTOP), in_main_thread=False),
    "loop": Fault(loop_for_ever, in_main_thread=True),
    "sleep": Fault(lambda: time.sleep(LIMIT), in_main_thread=True),
    "lock": Fault(wait_for_a_lock_that_it_holds, in_main_thread=True),
    "long call": Fault(hold_the_interpreter, in_main_thread=True),
    "loader": Fault(load_from_a_hanging_dataset, in_main_thread=True),
    "group": Fault(meet_in_another_group, in_main_thread=True),
    "nothing": Fault(lambda: None, in_main_thread=True),
}


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run: how many, on which device, in which layout, and after how many seconds one is missed."""

    number: int = 2
    device: str = "cpu"
    parallel: str = "dict(pipeline=1)"
    timeout: int = TIMEOUT


class Run:
    """A run, in the folder, in which one rank commits a fault in a phase. A subclass may have other ranks."""

    of = Ranks()

    def __init__(
        self, folder: Path, fault: str, phase: str, *, launcher: str, rank: int = 1, delay: float = 0.0
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "text.txt").write_text("A run that is watched is not lost. " * 200)
        names = dict(fault=fault, phase=phase, rank=rank, delay=delay, timeout=self.of.timeout)
        names |= dict(device=self.of.device, parallel=self.of.parallel)
        paths = dict(folder=str(folder), text=str(folder / "text.txt"), run=str(folder / "run"))
        (folder / "config.py").write_text(CONFIG.format(**names, **paths))
        arguments = ["--config", str(folder / "config.py")]
        if phase == "load":
            arguments += ["--resume", "auto"]
        self.errors = folder / "errors.txt"
        self.process = self._start(launcher, arguments)

    def _start(self, launcher: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        if launcher == "nprocs":
            command = ["-m", "colonnade", "train", "--nprocs", str(self.of.number), *arguments]
        else:
            command = ["-m", "torch.distributed.run", "--nproc-per-node", str(self.of.number), "--master-port", "0"]
            command += [
                "--rdzv-backend",
                "c10d",
                "--rdzv-endpoint",
                "localhost:0",
                "-m",
                "colonnade",
                "train",
                *arguments,
            ]
        environment = os.environ | dict(
            PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", COLONNADE_CACHE=str(self.folder / "cache")
        )
        environment.pop("RANK", None)
        with self.errors.open("w") as errors:
            return subprocess.Popen(
                [sys.executable, *command], cwd=self.folder, env=environment, stdout=errors, stderr=subprocess.STDOUT
            )

    @property
    def began(self) -> float | None:
        """The time at which the fault was committed."""
        mark = self.folder / "faulty"
        return mark.stat().st_mtime if mark.exists() else None

    def forget(self) -> None:
        """Remove the marks of a run that has ended, before another one starts in its folder."""
        for file in (self.folder / "faulty", *self.folder.glob("rank_*")):
            file.unlink(missing_ok=True)

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks."""
        return [int(file.read_text() or 0) for file in sorted(self.folder.glob("rank_*"))]

    def text(self) -> str:
        return self.errors.read_text(errors="replace")

    def seconds_until(self, is_true: Callable[[], object]) -> float:
        """Return the seconds from the fault until this comes to be true, or infinity."""
        assert wait_until(lambda: self.began is not None or self.process.poll() is not None), "no fault"
        assert self.began is not None, self.text()
        found = wait_until(is_true, patient(60.0))
        return time.time() - self.began if found else float("inf")

    def seconds_until_named(self, pattern: str) -> float:
        return self.seconds_until(lambda: re.search(pattern, self.text()))

    def seconds_until_gone(self) -> float:
        return self.seconds_until(lambda: not any(map(is_alive, self.ranks())) and self.process.poll() is not None)

    def clean_up(self) -> None:
        for process in (self.process.pid, *self.ranks()):
            if is_alive(process):
                os.kill(process, signal.SIGKILL)
        self.process.wait()


def is_alive(process: int) -> bool:
    """Return whether a process runs or is stopped, and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False

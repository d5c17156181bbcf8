"""Random kills of runs: what is drawn from a seed, and the launch under which a run is killed and goes on.

COLONNADE_KILL_SEED=7 COLONNADE_KILLS=200 pytest -m slow tests/test_random_kills.py
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.killed_runs import Layout
from tests.killer import ROOT, Kill, calls_folder, kill_file, killed_file
from tests.patience import LIMIT, patient, session, wait_until

SEED = int(os.environ.get("COLONNADE_KILL_SEED", "0"))
NUM_KILLS = int(os.environ.get("COLONNADE_KILLS", "100"))

SIGNALS = [
    *[signal.SIGKILL] * 8,
    *(signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGSEGV, signal.SIGSTOP),
]
"""The signals that are drawn from: mostly SIGKILL."""


@dataclass(frozen=True)
class AfterSeconds:
    """A signal to `rank`, so many seconds after the launch or after the kill before, whatever the rank does then."""

    rank: int
    seconds: float
    signal: int

    def __str__(self) -> str:
        return f"{signal.Signals(self.signal).name} to rank {self.rank} after {self.seconds:.2f} s"


def calls_of(run: Path, threads: str = "main") -> list[dict[str, int]]:
    """Return how often each rank called each function in a run that had a folder for it, on its "main" thread or in the
    "background".
    """
    files = sorted(calls_folder(run).glob(f"{threads}_*"))
    return [json.loads(file.read_text()) for file in files]


def draw_kill(draw: random.Random, calls: Sequence[Mapping[str, int]], share: float, kinds: Sequence[int]) -> Kill:
    """Return a kill at one of the first calls, a `share` of them, of a function that is drawn as likely as any other.

    So a save, which calls few functions a few times, is hit as often as a backward.
    """
    rank = draw.randrange(len(calls))
    function = draw.choice(sorted(calls[rank]))
    most = max(1, int(calls[rank][function] * share))
    return Kill(rank, function, draw.randint(1, most), draw.choice(kinds))


class Torchrun:
    """A run under torchrun, in a session of its own, which restarts its ranks when one is killed.

    Every launch is with `--resume auto`: so a restart goes on.
    """

    def __init__(self, layout: Layout, folder: Path, *, restarts: int, more: Sequence[str] = ()) -> None:
        self.folder = folder
        self.screen = folder.with_name(f"{folder.name}.screen")
        options = ["--standalone", "--nproc-per-node", str(layout.num_ranks), "--max-restarts", str(restarts)]
        options += ["--monitor-interval", "0.1"]
        command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "colonnade", "train"]
        command += ["--resume", "auto", "--set", *layout.assignments(folder), *more]
        with self.screen.open("a") as out:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def __enter__(self) -> "Torchrun":
        return self

    def __exit__(self, *_: object) -> None:
        for left in session(self._process.pid):
            os.kill(left, signal.SIGKILL)
        self._process.wait()

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> int:
        """Return the exit code of torchrun, once no process of its session is left. Fails if one stays."""
        code = self._process.wait(LIMIT)
        assert wait_until(lambda: not session(self._process.pid), patient(20.0)), session(self._process.pid)
        return code

    def ranks(self) -> dict[int, int]:
        """Return the processes of the ranks that run now, by rank."""
        found = {}
        for process in session(self._process.pid):
            if (rank := _rank_of(process)) is not None:
                found[rank] = process
        return found

    def send(self, kill: Kill | AfterSeconds) -> bool:
        """Have a kill come; return whether it did, before the run ended."""
        return self._send_after(kill) if isinstance(kill, AfterSeconds) else self._send_at(kill)

    def _send_after(self, kill: AfterSeconds) -> bool:
        time.sleep(kill.seconds)
        if (process := self.ranks().get(kill.rank)) is None:
            return False
        os.kill(process, kill.signal)
        return True

    def _send_at(self, kill: Kill) -> bool:
        kill.write(self.folder)
        wait_until(lambda: killed_file(self.folder).exists() or self.has_ended())
        kill_file(self.folder).unlink(missing_ok=True)
        return killed_file(self.folder).exists()


def _rank_of(process: int) -> int | None:
    """Return the rank that torchrun gave a process; None for a process that is no rank."""
    try:
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(text[5:]) for text in variables if text.startswith(b"RANK=")), None)

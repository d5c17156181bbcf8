"""A callback that samples what the process of a rank holds, every few hundred steps of a long run."""

import ctypes
import gc
import json
import os
import sys
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

from training.callbacks import Callback, Run
from training.metrics import MetricsLine

APART = 500
OFFSET = 25  # steps after a checkpoint, whose writing in the background has ended by then


@dataclass(frozen=True)
class Sample:
    """The resources that a process held after `step`: memory, open files, threads, Python's containers."""

    step: int
    resident: int
    files: int
    threads: int
    containers: int


def samples_folder(run: Path) -> Path:
    """Return the folder in which each rank writes its samples, one a line."""
    return run.with_name(f"{run.name}.samples")


def samples_of(run: Path) -> list[list[Sample]]:
    """Return the samples of each rank of a run."""
    files = sorted(samples_folder(run).iterdir())
    return [[Sample(**json.loads(line)) for line in file.read_text().splitlines()] for file in files]


class Probe(Callback):
    """Writes a sample every `APART` steps. Memory that is free, but not yet given back, is given back before."""

    on_every_rank = True

    def on_start(self, run: Run) -> None:
        samples_folder(run.folder).mkdir(exist_ok=True)
        self._file = samples_folder(run.folder) / f"rank_{run.rank}"

    def on_step(self, line: MetricsLine) -> None:
        if line["step"] % APART == OFFSET:
            with self._file.open("a") as out:
                out.write(json.dumps(asdict(sample(line["step"]))) + "\n")


def sample(step: int) -> Sample:
    """Return what this process holds now."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    containers = sum(sys.getsizeof(x) for x in gc.get_objects() if type(x) in (list, dict, set, deque))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE")
    num_files, num_threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    return Sample(step, resident, num_files, num_threads, containers)

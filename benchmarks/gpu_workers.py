"""The processes of `benchmarks.multi_gpu`: torchrun's own supervise, and each has a worker that does the jobs."""

import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_jobs import Job, RankSetup, Row, bytes_beside_torch, clean, meet

START_SECONDS = 90.0  # in which workers must have started
LEAST_SECONDS = 10.0  # of the budget that must be left for a job to be started
GRACE_SECONDS = 5.0  # in which the other ranks' errors must have come for the workers to go on
WITHOUT_NVLS = dict(NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1", NVSHMEM_DISABLE_NVLS="1")
ELSEWHERE = "another rank failed"


@dataclass(frozen=True)
class Outcome:
    """The rows of a job, or what went wrong. `goes_on`: whether the worker can do another job after the error."""

    rows: list[Row]
    error: str = ""
    goes_on: bool = True


def serve(connection: Connection, setup: RankSetup, meeting_point: str, backend: str) -> None:
    """Run a worker: join the other workers, and run each job that is received, until None is."""
    torch.set_num_threads(1)
    if setup.on_gpu:
        torch.cuda.set_device(setup.device)
        torch.zeros(1, device=setup.device)  # a CUDA context, without a process group
        setup = replace(setup, bytes_before=bytes_beside_torch(setup))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if backend == "nccl" else backend,
        init_method=meeting_point,
        rank=setup.rank,
        world_size=setup.world,
        device_id=setup.device if backend == "nccl" else None,
        timeout=timedelta(minutes=10),
    )
    connection.send(Outcome([]))
    while (job := connection.recv()) is not None:
        connection.send(_done(job, setup))
        clean(setup)


def _done(job: Job, setup: RankSetup) -> Outcome:
    try:
        return Outcome(job.run(setup))
    except BaseException as error:
        with (setup.out / f"errors_{setup.rank}.txt").open("a") as file:
            print(f"{job.part} {job.model} {job.name}", traceback.format_exc(), sep="\n", file=file)
        lines = str(error).strip().splitlines() or [""]
        return Outcome([], f"{type(error).__name__}: {lines[0]}")


@dataclass(frozen=True)
class MeetJob:
    """A meeting of all ranks, which says whether they can go on after an error of all of them."""

    part: str = "meeting"
    name: str = ""
    model: str = ""
    seconds: float = 0.0

    def run(self, setup: RankSetup) -> list[Row]:
        clean(setup)
        dist.all_reduce(torch.zeros(1, device=setup.device))
        meet(setup)
        return []


class Worker:
    """This rank's worker process, of a generation of workers that were started together.

    `marker` is a file that exists once a worker of this generation has failed.
    """

    def __init__(self, setup: RankSetup, folder: Path, generation: int, backend: str) -> None:
        self._folder, self._generation, self._jobs = folder, generation, 0
        self.connection, theirs = get_context("spawn").Pipe()
        meeting_point = f"file://{folder}/meeting_{generation}"
        self.process: BaseProcess = get_context("spawn").Process(
            target=serve, args=(theirs, setup, meeting_point, backend), daemon=True
        )
        self.process.start()
        theirs.close()

    @property
    def marker(self) -> Path:
        return self._folder / f"failed_{self._generation}_{self._jobs}"

    def do(self, job: Job, seconds: float) -> Outcome:
        """Run a job and return its outcome, an error after so many seconds or soon after another rank has one."""
        self._jobs += 1
        try:
            self.connection.send(job)
        except (BrokenPipeError, ConnectionError):
            self.marker.touch()
            return Outcome([], "its worker is gone", goes_on=False)
        return self.wait(seconds)

    def wait(self, seconds: float) -> Outcome:
        """Wait for the worker's next outcome."""
        deadline = time.monotonic() + seconds
        outcome = Outcome([], f"no end after {seconds:.0f} s", goes_on=False)
        ends_early = False
        while time.monotonic() < deadline:
            if self.connection.poll(0.05):
                outcome = self._received()
                break
            if not ends_early and self.marker.exists():
                ends_early, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
                outcome = Outcome([], ELSEWHERE, goes_on=False)
        if outcome.error:
            self.marker.touch()
        return outcome

    def _received(self) -> Outcome:
        try:
            outcome: Outcome = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            return Outcome([], f"it died with exit code {self.process.exitcode}", goes_on=False)
        return outcome

    def end(self, *, at_once: bool) -> None:
        """End the worker process, unless `at_once` after it has done what it was doing."""
        if not at_once and self.process.is_alive():
            self.connection.send(None)
            self.process.join(5)
        self.process.kill()
        self.process.join()


class Driver:
    """The driver of this rank, which has a worker.

    The drivers of all ranks make the same calls, and agree on the outcome of each.
    """

    def __init__(self, setup: RankSetup, folder: Path, backend: str, deadline: float) -> None:
        self.setup, self.folder, self.backend, self.deadline = setup, folder, backend, deadline
        self.generation = 0
        self.worker: Worker | None = None

    @property
    def left(self) -> float:
        """The seconds that are left of the budget, as the first rank counts them. Every rank calls this."""
        left: float = of_first_rank(self.deadline - time.monotonic())
        return left

    def do(self, job: Job, limit: float) -> Outcome:
        """Run a job on all workers, within `limit` seconds and within what is left of the budget.

        Workers go on after an error that all of them have had, if they can meet then. Otherwise the next job has new
        ones.
        """
        left = self.left
        if left < LEAST_SECONDS:
            return Outcome([], "left out: no time")
        outcome = Outcome([])
        if self.worker is None:
            self.worker = Worker(self.setup, self.folder, self.generation, self.backend)
            outcome = self._agreed(self.worker.wait(min(START_SECONDS, left)))
            left = self.left
        if not outcome.error:
            outcome = self._agreed(self.worker.do(job, max(1.0, min(max(limit, job.seconds), left))))
        if outcome.error:
            can_meet = outcome.goes_on and not self._agreed(self.worker.do(MeetJob(), GRACE_SECONDS)).error
            if not can_meet:
                self.end(at_once=True)
        return outcome

    def end(self, *, at_once: bool) -> None:
        """End this rank's worker; the next job starts another one."""
        if self.worker is not None:
            self.worker.end(at_once=at_once)
        self.worker = None
        self.generation += 1

    def _agreed(self, mine: Outcome) -> Outcome:
        """Return what `agreed` says of the outcomes of all ranks."""
        outcomes: list[Any] = [None] * self.setup.world
        dist.all_gather_object(outcomes, mine)
        return agreed(outcomes)


def agreed(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the first rank's rows, and the first error of any rank. All go on if each has had an error of its own."""
    errors = [outcome.error for outcome in outcomes if outcome.error]
    first = next((error for error in errors if error != ELSEWHERE), "".join(errors[:1]))
    goes_on = all(outcome.goes_on and bool(outcome.error) == bool(first) for outcome in outcomes)
    return Outcome(outcomes[0].rows, first, goes_on)


def of_first_rank(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def seconds_since_start() -> float:
    """Return how long this process has been running: its imports count in a budget, too."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def prepare_environment() -> None:
    """Set the variables that workers inherit."""
    os.environ.update(WITHOUT_NVLS)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars of what peers save and load

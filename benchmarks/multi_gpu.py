"""Measure every layout on the GPUs of one host: parity, speed, overlap of communication, and bandwidth.

    torchrun --nproc-per-node 4 -m benchmarks.multi_gpu [--only parity speed overlap bandwidth] [--models opt-6.7b]
        [--layouts "ZeRO 2" fsdp2 ...] [--batch 4] [--budget 450] [--out runs/multi_gpu]
    torchrun --nproc-per-node 4 -m benchmarks.multi_gpu --tiny     # on a CPU, with gloo

It prints each row as soon as it is measured, and all of them as a table at the end: the part, the model, the layout or
the peer, tokens a second, tokens a second of one GPU, the model FLOPs utilization (MFU), the peak memory of a GPU in
GiB, `ours is` (our tokens a second divided by this peer's), and a note. OUT/results.json has every figure, and the
traces are beside it.

The command is the same for 2, 4 and 8 GPUs. torchrun's processes only supervise: each has a worker process, which does
one job after another. A job that fails or takes too long loses its row, and the workers are started again.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from benchmarks.gpu_jobs import BandwidthJob, ParityJob, RankSetup, Row, SpeedJob, clean, write_rows
from benchmarks.gpu_layouts import Layout, parity_layouts, speed_layouts
from benchmarks.gpu_peers import ON_GPUS_ALONE
from models.family import named_sizes
from parallel.engine.context import Place
from parallel.engine.device import choose_device

PARTS = ("parity", "bandwidth", "speed", "overlap")
START_SECONDS = 90.0  # in which workers must have started
LEAST_SECONDS = 15.0  # of the budget that must be left for a job to be started
WITHOUT_NVLS = dict(NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1")
COLUMNS = "{:<9} {:<9} {:<34} {:>9} {:>9} {:>6} {:>9} {:>8}  {}"
HEADINGS = ("part", "model", "", "tokens/s", "per GPU", "MFU", "peak GiB", "ours is", "")

Job: TypeAlias = ParityJob | SpeedJob | BandwidthJob


@dataclass(frozen=True)
class Outcome:
    """The rows of a job, or what went wrong."""

    rows: list[Row]
    error: str = ""


ELSEWHERE = "another rank failed"


def jobs_of(arguments: argparse.Namespace, setup: RankSetup) -> Iterator[Job]:
    """Yield all jobs that the arguments ask for, the cheap parts first."""
    if "parity" in arguments.only:
        yield from (ParityJob(x) for x in parity_layouts(setup.world) if _is_wanted(arguments, x.name))
    if "bandwidth" in arguments.only:
        yield BandwidthJob(parity_layouts(setup.world))
    for model in arguments.models:
        yield from _speeds(arguments, setup, model)
    if "speed" in arguments.only and _is_wanted(arguments, "weak"):
        yield from _weak_scaling(arguments, setup)


def _is_wanted(arguments: argparse.Namespace, *names: str) -> bool:
    """Return whether one of these names is among --layouts, or there is no such choice."""
    return not arguments.layouts or any(name in arguments.layouts for name in names)


def _speeds(arguments: argparse.Namespace, setup: RankSetup, model: str) -> Iterator[Job]:
    """Yield the jobs of speed and overlap of one model.

    Where both are asked for, the trace is taken in the job that measures the speed. Only the first model is traced.
    """
    times = "speed" in arguments.only
    traces = "overlap" in arguments.only and model == arguments.models[0]
    steps, part = (arguments.steps, "speed") if times else (0, "overlap")
    for layout in speed_layouts(setup.world):
        trace = traces and layout.traced
        if _is_wanted(arguments, layout.name) and (times or trace):
            yield SpeedJob(layout, model, arguments.batch, steps=steps, trace=trace, part=part)
        for peer in layout.peers if times else ():
            if setup.device.type == "cpu" and peer in ON_GPUS_ALONE:
                continue
            if _is_wanted(arguments, layout.name, peer):
                yield SpeedJob(layout, model, arguments.batch, peer=peer, steps=steps)


def _weak_scaling(arguments: argparse.Namespace, setup: RankSetup) -> Iterator[Job]:
    """Yield the jobs of weak scaling, for ZeRO 2 and a model that one GPU has enough memory for."""
    zero = Layout("ZeRO 2", dict(zero=dict(stage=2)))
    model = "opt-tiny" if setup.tiny else "opt-2.7b"
    for alone in (True, False):
        yield SpeedJob(zero, model, arguments.batch, alone=alone, steps=arguments.steps, part="weak")


# -- the workers ------------------------------------------------------------------------------------------------------


def serve(connection: Connection, setup: RankSetup, meeting_point: str, backend: str) -> None:
    """Run a worker: join the other workers, and run each job that is received, until None is."""
    torch.set_num_threads(1)
    on_gpu = setup.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(setup.device)
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
        try:
            outcome = Outcome(job.run(setup))
        except BaseException as error:
            traceback.print_exc()
            lines = str(error).splitlines() or [""]
            outcome = Outcome([], f"{type(error).__name__}: {lines[0]}")
        connection.send(outcome)
        clean(setup)


class Worker:
    """This rank's worker process, of a generation of workers that were started together.

    `marker` is a file that exists once a worker of this generation has failed.
    """

    def __init__(self, setup: RankSetup, folder: Path, generation: int, backend: str) -> None:
        self.marker = folder / f"failed_{generation}"
        self.connection, theirs = get_context("spawn").Pipe()
        meeting_point = f"file://{folder}/meeting_{generation}"
        self.process: BaseProcess = get_context("spawn").Process(
            target=serve, args=(theirs, setup, meeting_point, backend), daemon=True
        )
        self.process.start()
        theirs.close()

    def do(self, job: Job, seconds: float) -> Outcome:
        """Run a job and return its outcome, an error after so many seconds or as soon as another rank has one."""
        self.connection.send(job)
        return self.wait(seconds)

    def wait(self, seconds: float) -> Outcome:
        """Wait for the worker's next outcome."""
        deadline = time.monotonic() + seconds
        outcome = Outcome([], f"no end after {seconds:.0f} s")
        while time.monotonic() < deadline:
            if self.connection.poll(0.05):
                outcome = self._received()
                break
            if self.marker.exists():
                return Outcome([], ELSEWHERE)
        if outcome.error:
            self.marker.touch()
        return outcome

    def _received(self) -> Outcome:
        try:
            outcome: Outcome = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join(5)
            return Outcome([], f"it died with exit code {self.process.exitcode}")
        return outcome

    def end(self, *, at_once: bool) -> None:
        """End the worker process, unless `at_once` after it has done what it was doing."""
        if not at_once:
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

    def do(self, job: Job, limit: float) -> Outcome:
        """Run a job on all workers, within `limit` seconds and within what is left of the budget."""
        left: float = _of_first_rank(self.deadline - time.monotonic())
        if left < LEAST_SECONDS:
            return Outcome([], "left out: no time")
        outcome = Outcome([])
        if self.worker is None:
            self.worker = Worker(self.setup, self.folder, self.generation, self.backend)
            outcome = self._agreed(self.worker.wait(min(START_SECONDS, left)))
            left = _of_first_rank(self.deadline - time.monotonic())
        if not outcome.error:
            outcome = self._agreed(self.worker.do(job, max(1.0, min(limit, left))))
        if outcome.error:
            self.end(at_once=True)
        return outcome

    def end(self, *, at_once: bool) -> None:
        """End this rank's worker; the next job starts another one."""
        if self.worker is not None:
            self.worker.end(at_once=at_once)
        self.worker = None
        self.generation += 1

    def _agreed(self, mine: Outcome) -> Outcome:
        """Return the first rank's rows, and the first error of any rank."""
        outcomes: list[Any] = [None] * self.setup.world
        dist.all_gather_object(outcomes, mine)
        errors = [outcome.error for outcome in outcomes if outcome.error]
        first = next((error for error in errors if error != ELSEWHERE), "".join(errors[:1]))
        return Outcome(outcomes[0].rows, first)


def _of_first_rank(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


# -- the table --------------------------------------------------------------------------------------------------------


def with_ratios(rows: list[Row]) -> list[Row]:
    """Return the rows with our speed relative to each peer's, and with the efficiency of weak scaling."""
    speeds = {(r["part"], r["model"], r["name"]): r["tokens_per_second"] for r in rows if "tokens_per_second" in r}
    found = []
    for row in rows:
        ours = speeds.get((row["part"], row.get("model"), row.get("beside")))
        if "tokens_per_second" in row and ours and row["name"] != row["beside"] and row["part"] == "speed":
            row = row | dict(ours_is=ours / row["tokens_per_second"])
        alone = speeds.get((row["part"], row.get("model"), f"{row['name']} alone"))
        if row["part"] == "weak" and alone and "per_gpu" in row:
            efficiency = row["per_gpu"] / alone
            row = row | dict(efficiency=efficiency, note=f"{efficiency:.1%} of what each does alone; {row['note']}")
        found.append(row)
    return found


def line(row: Row) -> str:
    """Return a row as a line of the table."""

    def number(key: str, form: str) -> str:
        return form.format(row[key]) if row.get(key) is not None else ""

    return COLUMNS.format(
        row["part"],
        row.get("model", ""),
        row["name"][:34],
        number("tokens_per_second", "{:.0f}"),
        number("per_gpu", "{:.0f}"),
        number("mfu", "{:.1%}"),
        number("peak_gib", "{:.1f}") if row.get("peak_gib") else "",
        number("ours_is", "{:.2f}x"),
        row["note"],
    ).rstrip()


def best_of(rows: list[Row]) -> list[str]:
    """Return a line that names our fastest layout, for each model."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows if row["part"] == "speed" and "per_gpu" in row):
        own = [r for r in rows if r["part"] == "speed" and r["model"] == model and r.get("name") == r.get("beside")]
        if own:
            best = max(own, key=lambda row: float(row["tokens_per_second"]))
            found.append(f"The fastest of ours, {model}: {best['name']}, {best['tokens_per_second']:.0f} tokens/s.")
    return found


def run(arguments: argparse.Namespace, driver: Driver) -> list[Row]:
    """Run all jobs, and print and write each row as soon as there is one."""
    setup, rows = driver.setup, []
    for job in jobs_of(arguments, setup):
        started = time.monotonic()
        outcome = driver.do(job, arguments.limit)
        failed = Row(part=job.part, name=job.name, model=getattr(job, "model", ""), note=outcome.error, failed=True)
        new = [failed] if outcome.error else outcome.rows
        rows += new
        if setup.rank == 0:
            for row in with_ratios(rows)[len(rows) - len(new) :]:
                print(f"{line(row)}  [{time.monotonic() - started:.0f} s]", flush=True)
            write_rows(arguments.out, with_ratios(rows))
    return with_ratios(rows)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=named_sizes())
    parser.add_argument("--layouts", nargs="+", default=[], help="only these, or peers; 'weak': weak scaling")
    parser.add_argument("--batch", type=int, default=4, help="samples a step, for each GPU")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after two that are not")
    parser.add_argument("--budget", type=float, default=450, help="seconds for everything")
    parser.add_argument("--limit", type=float, default=75, help="seconds for a job")
    parser.add_argument("--out", type=Path, default=Path("runs/multi_gpu"))
    parser.add_argument("--tiny", action="store_true", help="a small model, a step each, on the CPU")
    arguments = parser.parse_args()
    arguments.models = arguments.models or ["opt-tiny" if arguments.tiny else "opt-6.7b"]
    if arguments.tiny:
        arguments.steps = min(arguments.steps, 1)
    return arguments


def main() -> None:
    deadline = time.monotonic() + (arguments := read_arguments()).budget
    os.environ.update(WITHOUT_NVLS)  # which the workers inherit
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    place = Place.from_environment()
    wanted = "cpu" if arguments.tiny else "auto"
    device, backend = choose_device(wanted, local_rank=place.local_rank, local_world_size=place.local_world_size)
    if device.type == "cpu" and not arguments.tiny:
        sys.exit("There is no GPU. Try --tiny.")
    dist.init_process_group("gloo", rank=place.rank, world_size=place.world_size)
    arguments.out = Path(_of_first_rank(str(arguments.out.resolve())))
    arguments.out.mkdir(parents=True, exist_ok=True)
    setup = RankSetup(place.rank, place.world_size, device, arguments.out, arguments.tiny)
    folder = Path(_of_first_rank(tempfile.mkdtemp()))
    driver = Driver(setup, folder, backend, deadline)
    if place.rank == 0:
        where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(f"{place.world_size} × {where}, torch {torch.__version__}; NVLink multicast off; bf16 unless parity")
        print(COLUMNS.format(*HEADINGS), flush=True)
    rows = run(arguments, driver)
    driver.end(at_once=False)
    dist.barrier()
    if place.rank == 0:
        print("\n".join(["", COLUMNS.format(*HEADINGS), *map(line, rows), *best_of(rows)]), flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(arguments.out / ".parity", ignore_errors=True)
    dist.destroy_process_group()
    sys.exit(1 if any(row.get("failed") for row in rows) and place.rank == 0 else None)


if __name__ == "__main__":
    main()

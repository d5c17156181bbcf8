"""Measure every layout on the GPUs of one host: parity, speed, hidden communication, faults, and bandwidth.

    torchrun --nproc-per-node 4 -m benchmarks.multi_gpu [--only parity fp8 ...] [--models opt-6.7b llama-3.1-8b]
        [--sequence 2048 8192] [--precision bf16 fp8] [--layouts "ZeRO 2" fsdp2 ...] [--families opt llama]
        [--batch 4] [--budget 450] [--out runs/multi_gpu]
    torchrun --nproc-per-node 4 -m benchmarks.multi_gpu --tiny     # on a CPU, with gloo

The parts, in the order in which they are measured:

    parity     in fp32 beside Hugging Face's, of each family; fp8: the error in 8 bits beside that of one rank
    speed      of our layouts and of their peers; overlap: the share of a step's communication that is hidden
    ring       a layer's attention, and ways to send to the next rank; gather: parameters that come from the host
    weak       one GPU alone and all together; faults: a rank that is killed or stopped, and a run that goes on
    nccl       memory; bandwidth along each axis

It prints each row as soon as it is measured, and all of them as a table at the end: the part, the model, the layout or
the peer, tokens a second, tokens a second of one GPU, the model FLOPs utilization (MFU, of bf16's peak), the peak
memory of a GPU in GiB, `ours is` (our tokens a second divided by this peer's), and a note. OUT/results.json has every
figure, and the traces are beside it.

The command is the same for 2, 4 and 8 GPUs. torchrun's processes only supervise: each has a worker process, which does
one job after another. A job that fails or takes too long loses its row; OUT/errors_*.txt has its tracebacks.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.gpu_faults import FaultJob
from benchmarks.gpu_jobs import Job, RankSetup, Row, write_rows
from benchmarks.gpu_layouts import (
    ALONE,
    OFFLOADED,
    fp8_layouts,
    layouts_of_each_family,
    parity_layouts,
    speed_layouts,
    weak_layouts,
)
from benchmarks.gpu_links import BandwidthJob, MemoryJob, RingJob
from benchmarks.gpu_parity import FAMILIES, EightBitJob, ParityJob
from benchmarks.gpu_peers import ON_GPUS_ALONE, PACKAGES
from benchmarks.gpu_speed import BASE, CHANGES, Sizes, SpeedJob
from benchmarks.gpu_table import COLUMNS, HEADINGS, line, summary, with_ratios
from benchmarks.gpu_workers import Driver, of_first_rank, prepare_environment, seconds_since_start
from models.family import named_sizes
from parallel.engine.context import Place
from parallel.engine.device import choose_device

PARTS = ("parity", "fp8", "speed", "overlap", "ring", "gather", "weak", "faults", "nccl", "bandwidth")
PRECISIONS = ("bf16", "fp8")


def jobs_of(arguments: argparse.Namespace, setup: RankSetup) -> Iterator[Job]:
    """Yield all jobs that the arguments ask for."""
    world, only = setup.world, arguments.only
    yield from _parity(arguments, world)
    yield from _speeds(arguments, setup)
    if "ring" in only:
        yield from (RingJob(tokens) for tokens in (4096, 16384))
    if "gather" in only:
        yield from _of_one_model("gather", arguments, setup, "opt-1.3b")
    if "weak" in only:
        yield from _of_one_model("weak", arguments, setup, "opt-2.7b")
    if "faults" in only:
        yield FaultJob()
    if "nccl" in only:
        names = ("ZeRO 2", "1d", "pipeline 1f1b", "ZeRO 2 × context ring", "3d", "pipeline 2 × 1d")
        yield MemoryJob([layout for layout in speed_layouts(world) if layout.name in names])
    if "bandwidth" in only:
        yield BandwidthJob([layout for layout in parity_layouts(world) if "zero_bubble" not in layout.name])


def _is_wanted(arguments: argparse.Namespace, *names: str) -> bool:
    """Return whether one of these names is among --layouts, or there is no such choice."""
    return not arguments.layouts or any(name in arguments.layouts for name in names)


def _parity(arguments: argparse.Namespace, world: int) -> Iterator[Job]:
    """Yield the jobs of parity: first the layouts of each family in all families, then all others in the first one."""
    layouts = [x for x in parity_layouts(world) if _is_wanted(arguments, x.name)]
    in_all = {layout.name for layout in layouts_of_each_family(world)}
    if "parity" in arguments.only:
        for layout in layouts:
            families = arguments.families if layout.name in in_all else arguments.families[:1]
            yield from (ParityJob(layout, family) for family in families)
    if "fp8" in arguments.only:
        yield from (EightBitJob(x) for x in fp8_layouts(world) if _is_wanted(arguments, x.name))


def _speeds(arguments: argparse.Namespace, setup: RankSetup) -> Iterator[Job]:
    """Yield the jobs of speed and overlap: the layouts that come first with all models, lengths and precisions, and
    then all others.

    Where both are asked for, the trace is taken in the job that measures the speed. Only the first model is traced, at
    the first length and in the first precision.
    """
    times, traces = "speed" in arguments.only, "overlap" in arguments.only
    steps, part = (arguments.steps, "speed") if times else (0, "overlap")
    all_sizes = [
        Sizes(model, sequence, precision, arguments.batch)
        for precision, sequence, model in product(arguments.precision, arguments.sequence, arguments.models)
    ]
    for comes_first, sizes in product((True, False), all_sizes):
        for layout in speed_layouts(setup.world):
            if layout.comes_first is not comes_first or not layout.exists_in(sizes.precision):
                continue
            trace = traces and layout.traced and sizes == all_sizes[0]
            if _is_wanted(arguments, layout.name) and (times or trace):
                yield SpeedJob(layout, sizes, steps=steps, trace=trace, part=part)
            for peer in layout.peers_in(sizes.precision) if times else ():
                if _is_wanted(arguments, layout.name, peer) and not _is_missing(peer, setup):
                    yield SpeedJob(layout, sizes, peer=peer, steps=steps)


def _is_missing(peer: str, setup: RankSetup) -> bool:
    return not setup.on_gpu and (peer in ON_GPUS_ALONE or find_spec(PACKAGES.get(peer, "torch")) is None)


def _of_one_model(part: str, arguments: argparse.Namespace, setup: RankSetup, model: str) -> Iterator[Job]:
    """Yield the jobs of weak scaling, or those of parameters that come from the host."""
    sizes = Sizes("opt-tiny" if setup.tiny else model, samples=arguments.batch)
    if part == "weak":
        yield SpeedJob(ALONE, sizes, alone=True, steps=arguments.steps, part=part)
        for layout in weak_layouts():
            yield SpeedJob(layout, sizes, steps=arguments.steps, part=part, trace=True)
    else:
        yield from (SpeedJob(OFFLOADED, sizes, steps=arguments.steps, part=part, change=change) for change in CHANGES)


def run(arguments: argparse.Namespace, driver: Driver) -> list[Row]:
    """Run all jobs, and print and write each row as soon as there is one."""
    setup, rows = driver.setup, []
    for job in jobs_of(arguments, setup):
        started = time.monotonic()
        outcome = driver.do(job, arguments.limit)
        failed = Row(part=job.part, name=job.name, model=job.model, note=outcome.error, failed=True)
        new = [failed] if outcome.error else outcome.rows
        rows += new
        if setup.rank == 0:
            for row in with_ratios(rows)[len(rows) - len(new) :]:
                print(f"{line(row)}  [{time.monotonic() - started:.0f} s]", flush=True)
            write_rows(arguments.out, with_ratios(rows))
    return with_ratios(rows)


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=named_sizes())
    parser.add_argument("--sequence", nargs="+", type=int, default=[BASE], help="tokens of a sample")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["bf16"])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=["opt", "llama", "qwen3", "gpt2"])
    parser.add_argument("--layouts", nargs="+", default=[], help="only these layouts, or peers")
    parser.add_argument("--batch", type=int, default=4, help=f"samples of {BASE} tokens a step, for each GPU")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after two that are not")
    parser.add_argument("--budget", type=float, default=450, help="seconds for everything")
    parser.add_argument("--limit", type=float, default=75, help="seconds for a job")
    parser.add_argument("--out", type=Path, default=Path("runs/multi_gpu"))
    parser.add_argument("--tiny", action="store_true", help="a small model, a step each, on the CPU")
    arguments = parser.parse_args(argv)
    arguments.models = arguments.models or ["opt-tiny" if arguments.tiny else "opt-6.7b"]
    if arguments.tiny:
        arguments.steps = min(arguments.steps, 1)
    return arguments


def main() -> None:
    arguments = read_arguments()
    deadline = time.monotonic() + arguments.budget - seconds_since_start()
    prepare_environment()
    place = Place.from_environment()
    wanted = "cpu" if arguments.tiny else "auto"
    device, backend = choose_device(wanted, local_rank=place.local_rank, local_world_size=place.local_world_size)
    if device.type == "cpu" and not arguments.tiny:
        sys.exit("There is no GPU. Try --tiny.")
    dist.init_process_group("gloo", rank=place.rank, world_size=place.world_size)
    arguments.out = Path(of_first_rank(str(arguments.out.resolve())))
    arguments.out.mkdir(parents=True, exist_ok=True)
    setup = RankSetup(place.rank, place.world_size, device, arguments.out, arguments.tiny)
    folder = Path(of_first_rank(tempfile.mkdtemp()))
    driver = Driver(setup, folder, backend, deadline)
    if place.rank == 0:
        where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(f"{place.world_size} × {where}, torch {torch.__version__}; NVLink multicast off")
        print(COLUMNS.format(*HEADINGS), flush=True)
    rows = run(arguments, driver)
    driver.end(at_once=False)
    dist.barrier()
    if place.rank == 0:
        print("\n".join(["", COLUMNS.format(*HEADINGS), *map(line, rows), *summary(rows)]), flush=True)
        for path in (folder, arguments.out / ".parity", arguments.out / ".faults"):
            shutil.rmtree(path, ignore_errors=True)
    dist.destroy_process_group()
    sys.exit(1 if any(row.get("failed") for row in rows) and place.rank == 0 else None)


if __name__ == "__main__":
    main()

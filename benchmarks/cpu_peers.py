"""Measure tokens a second on a CPU: our engine beside torch, Hugging Face, Megatron-LM and DeepSpeed.

    python -m benchmarks.cpu_peers [--only single dp zero tp pp grid cube] [--processes 1 2 4 8] [--steps 3]

It prints a line for each contender: the number of processes, whose it is (ours or a peer's), its name, tokens a second,
`first is` (how many times as fast the first contender of the contest is: the median over steps of this one's seconds /
the first one's seconds in the same turn), the smallest and the largest of these ratios, the peak memory of a rank where
there is no peer, and the losses. Losses that disagree are marked, and the exit code says so.

The contenders of a contest use the same layout in the same processes, and take turns step by step, so that whatever
else runs on the machine slows all of them in the same way.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import deepspeed_peer, peers, pipeline_peers
from benchmarks.megatron_peer import IS_INSTALLED, megatron
from benchmarks.workload import GLOBAL_BATCH, SEQUENCE, SHAPE, Step, ours, save_model, tokens_of
from tests.harness import run
from training.metrics import peak_host_bytes

AGREEMENT = 1e-4  # relative, of the losses
COLUMNS = "{:>5} {:<5} {:<16} {:>9} {:>9} {:>9} {:>9}  {}"

Layout = dict[str, Any]
"""Sections of a config."""


@dataclass(frozen=True)
class Contest:
    """Our layouts and peers' that take turns on `world_size` processes; the others are compared with the first layout.

    Where there is no peer, the peak memory of each layout is measured too, in processes that hold nothing else.
    """

    kind: str
    world_size: int
    layouts: dict[str, Layout]
    peers: tuple[Callable[[Path, int, int], Step], ...] = ()


@dataclass(frozen=True)
class Result:
    """The seconds and the loss of each step of one contender."""

    name: str
    seconds: list[float]
    losses: list[float]


def contests() -> list[Contest]:
    """Return every contest that the command knows."""
    blocks = SHAPE["num_hidden_layers"]
    tensor_peers = (peers.tensor_parallel, *([megatron] if IS_INSTALLED else []))
    found = [Contest("single", 1, {"serial": {}}, (peers.one_process,))]
    for size in (2, 4):
        stages = dict(size=size, layers=(blocks // size,) * size)  # as the stages of torch's pipeline are
        found += [
            Contest("dp", size, {"data": {}}, (peers.ddp, peers.fsdp2, peers.fsdp2_kept)),
            *zero_contests(size),
            Contest("tp", size, {"1d": tensor("1d", size)}, tensor_peers),
            Contest(
                "pp",
                size,
                {"1f1b": dict(parallel=dict(pipeline=stages))},
                (pipeline_peers.one_f_one_b, pipeline_peers.interleaved),
            ),
        ]
    planes = {"2d": tensor("2d", 4), "2.5d (1×2×2)": tensor("2.5d", 4)}
    cubes = {"3d": tensor("3d", 8), "2.5d (2×2×2)": tensor("2.5d", 8, depth=2)}
    found.append(Contest("grid", 4, planes | {"1d": tensor("1d", 4)}))
    found.append(Contest("cube", 8, cubes | {"1d": tensor("1d", 8)}))
    return found


def zero_contests(size: int) -> list[Contest]:
    """Return a contest for each ZeRO stage, with the peers that shard as much.

    FSDP2 cannot leave gradients whole, as stage 1 does.
    """
    beside = {
        1: (peers.fsdp2_kept, deepspeed_peer.deepspeed1),
        2: (peers.fsdp2_kept, deepspeed_peer.deepspeed2),
        3: (peers.fsdp2, deepspeed_peer.deepspeed3),
    }
    count = 2 if deepspeed_peer.IS_INSTALLED else 1
    return [
        Contest("zero", size, {f"zero {stage}": dict(zero=dict(stage=stage))}, found[:count])
        for stage, found in beside.items()
    ]


def tensor(mode: str, size: int, **more: int) -> Layout:
    return dict(parallel=dict(tensor=dict(mode=mode, size=size, **more)))


def measure(
    rank: int, world_size: int, contest: Contest, folder: Path, steps: int, *, threads: int = 1
) -> list[Result]:
    """Train all contenders in turns; called on every rank, which has so many threads.

    The first turn is a warm-up: its losses are compared, its seconds are not.
    """
    contenders = {name: ours(folder, rank, world_size, layout) for name, layout in contest.layouts.items()}
    contenders |= {build.__name__: build(folder, rank, world_size) for build in contest.peers}
    torch.set_num_threads(threads)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    losses: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(steps + 1):
        ids = tokens_of(turn)
        for name, step in contenders.items():
            dist.barrier()
            start = time.perf_counter()
            losses[name].append(step(ids))
            dist.barrier()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return [Result(name, seconds[name], losses[name]) for name in contenders]


def peak_of(rank: int, world_size: int, layout: Layout, folder: Path) -> int:
    """Return the peak memory, in bytes, of this process while it trained two steps; called on every rank."""
    step = ours(folder, rank, world_size, layout)
    for turn in range(2):
        step(tokens_of(turn))
    return peak_host_bytes()


def run_contest(contest: Contest, folder: Path, steps: int) -> bool:
    """Run a contest and print a line for each contender; return whether their losses agree."""
    size = contest.world_size
    results = run(measure, size, contest, folder, steps, timeout=300.0)[0]
    agree = True
    for i, result in enumerate(results):
        difference = disagreement(result, results[0])
        agree &= not difference
        speed = GLOBAL_BATCH * SEQUENCE / median(result.seconds)
        ratio, spread = times_as_fast(results[0], result) if i else ("", "")
        peaks = [] if contest.peers else run(peak_of, size, contest.layouts[result.name], folder, timeout=300.0)
        peak = f"{max(peaks) / 2**20:.0f}" if peaks else ""
        values = " ".join(f"{loss:.5f}" for loss in result.losses)
        values += f"  DISAGREE by {difference:.1e}" if difference else ""
        owner = "ours" if result.name in contest.layouts else "peer"
        print(COLUMNS.format(size, owner, result.name, f"{speed:.0f}", ratio, spread, peak, values), flush=True)
    return agree


def disagreement(got: Result, want: Result) -> float:
    """Return the largest relative difference of two contenders' losses, or 0 where they agree."""
    differences = [abs(a - b) / abs(b) for a, b in zip(got.losses, want.losses, strict=True)]
    agrees = all(difference <= AGREEMENT for difference in differences)  # which NaN is not
    return 0.0 if agrees else max(differences)


def times_as_fast(first: Result, other: Result) -> tuple[str, str]:
    """Return how many times as fast the first is: the median over turns, and the smallest and the largest ratio."""
    ratios = [theirs / mine for theirs, mine in zip(other.seconds, first.seconds, strict=True)]
    return f"{median(ratios):.2f}x", f"{min(ratios):.2f}-{max(ratios):.2f}"


def main() -> None:
    everything = contests()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = list(dict.fromkeys(contest.kind for contest in everything))
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--processes", nargs="+", type=int, choices=(1, 2, 4, 8), default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    arguments = parser.parse_args()
    chosen = [c for c in everything if c.kind in arguments.only and c.world_size in arguments.processes]
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; one thread a process")
    print(COLUMNS.format("procs", "", "", "tokens/s", "first is", "min-max", "peak MiB", "losses"))
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        agreed = [run_contest(contest, Path(folder), arguments.steps) for contest in chosen]
    sys.exit(None if all(agreed) else "The losses disagree: these were not the same computation.")


if __name__ == "__main__":
    main()

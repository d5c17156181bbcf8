"""Tokens a second on this CPU: ours beside torch and Hugging Face in the same layout, in the same processes.

    python -m benchmarks.cpu_peers [--only single dp tp pp grid] [--processes 1 2 4] [--steps 3]

Contenders take turns step by step, so that whatever else runs on the machine slows all of them alike. A ratio is the
median over steps of (their seconds / our seconds) in the same turn; above 1, ours is faster.
"""

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from benchmarks import peers
from benchmarks.workload import GLOBAL_BATCH, SEQUENCE, SHAPE, Step, ours, save_model, tokens_of
from tests.harness import run

AGREEMENT = 1e-4  # relative, of the losses
COLUMNS = "{:<12} {:>5} {:<16} {:>9} {:>9} {:>9} {:>9}  {}"


@dataclass(frozen=True)
class Contest:
    """Ours in one layout on `world_size` processes, and the peers that it takes turns with."""

    kind: str
    name: str
    world_size: int
    layout: dict[str, Any]
    peers: tuple[Callable[[Path, int, int], Step], ...] = ()


@dataclass(frozen=True)
class Result:
    """Of one contender: seconds and loss of each step, and the peak of this process's memory, all contenders' in it."""

    name: str
    seconds: list[float]
    losses: list[float]
    peak_bytes: int


def contests() -> list[Contest]:
    blocks = SHAPE["num_hidden_layers"]
    found = [Contest("single", "serial", 1, {}, (peers.one_process,))]
    for size in (2, 4):
        stages = dict(size=size, layers=(blocks // size,) * size)  # torch's stages are split so
        found += [
            Contest("dp", "data", size, {}, (peers.ddp, peers.fsdp2)),
            Contest("tp", "1d", size, dict(tensor=dict(mode="1d", size=size)), (peers.tensor_parallel,)),
            Contest("pp", "pipeline", size, dict(pipeline=stages), (peers.pipeline,)),
        ]
    found.append(Contest("grid", "2d", 4, dict(tensor=dict(mode="2d", size=4))))
    found.append(Contest("grid", "2.5d depth 1", 4, dict(tensor=dict(mode="2.5d", size=4, depth=1))))
    return found


def measure(rank: int, world_size: int, contest: Contest, folder: Path, steps: int) -> list[Result]:
    """Runs on every rank. The first turn warms up: its losses count, its seconds do not."""
    contenders = {"ours": ours(folder, rank, world_size, contest.layout)}
    contenders |= {build.__name__: build(folder, rank, world_size) for build in contest.peers}
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return [Result(name, seconds[name], losses[name], peak) for name in contenders]


def report(contest: Contest, ranks: Sequence[Sequence[Result]]) -> bool:
    """Print a line for each contender; whether their losses agree."""
    results, agree = ranks[0], True
    for i, result in enumerate(results):
        differences = [abs(a - b) / abs(b) for a, b in zip(results[0].losses, result.losses, strict=True)]
        agrees = all(difference <= AGREEMENT for difference in differences)  # NaN does not
        agree &= agrees
        speed = GLOBAL_BATCH * SEQUENCE / median(result.seconds)
        ratios = [theirs / mine for theirs, mine in zip(result.seconds, results[0].seconds, strict=True)]
        ratio = f"{median(ratios):.2f}x" if i else ""
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}" if i else ""
        peak = f"{max(rank[0].peak_bytes for rank in ranks) / 2**20:.0f}" if not contest.peers else ""
        values = " ".join(f"{loss:.5f}" for loss in result.losses)
        values += "" if agrees else f"  DISAGREE by {max(differences):.1e}"
        name = contest.name if i == 0 else ""
        size = contest.world_size if i == 0 else ""
        print(COLUMNS.format(name, size, result.name, f"{speed:.0f}", ratio, spread, peak, values), flush=True)
    return agree


def main() -> None:
    everything = contests()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = list(dict.fromkeys(contest.kind for contest in everything))
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--processes", nargs="+", type=int, choices=(1, 2, 4), default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not")
    arguments = parser.parse_args()
    chosen = [c for c in everything if c.kind in arguments.only and c.world_size in arguments.processes]
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; one thread a process")
    print(COLUMNS.format("layout", "procs", "", "tokens/s", "ours is", "min-max", "peak MiB", "losses"))
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        results = [
            report(c, run(measure, c.world_size, c, Path(folder), arguments.steps, timeout=300.0)) for c in chosen
        ]
    sys.exit(None if all(results) else "The losses disagree: these were not the same computation.")


if __name__ == "__main__":
    main()

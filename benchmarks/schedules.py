"""Measure the pipeline schedules: with layers that sleep, beside the simulation; with real blocks, beside torch's.

    python -m benchmarks.schedules --sleep     # the order of the schedules, which no core decides (20 seconds)
    python -m benchmarks.schedules --blocks    # tokens a second beside torch.distributed.pipelining (3 minutes)
    python -m benchmarks.schedules --tiny      # small versions of both

`--sleep` prints for each schedule the seconds of its fastest step on `--ranks` ranks, those of the simulation, the
ratio of both, and the bubble of both: the idle fraction of the rank that is idle longest between its first forward and
its last gradient of weights. The exit code says whether the schedules have the simulation's order, and each step is
within 15% of it.

`--blocks` trains an OPT with each of our schedules and each of torch's, with the same number of stages on a rank, in
the same processes, in turns, step by step. It prints tokens a second, and how many times as fast ours is as torch's:
the median over steps, the smallest and the largest. Losses that disagree are marked, and the exit code says so.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType

from benchmarks import cpu_peers, pipeline_peers, sleeping
from benchmarks.workload import GLOBAL_BATCH, PP_MICROBATCHES, SEQUENCE, SHAPE, Step, save_model
from parallel.config import PipelineConfig
from tests.harness import run

PEERS: Mapping[str, Callable[[Path, int, int], Step]] = MappingProxyType(
    {
        "gpipe": pipeline_peers.gpipe,
        "1f1b": pipeline_peers.one_f_one_b,
        "interleaved": pipeline_peers.interleaved,
        "zero_bubble": pipeline_peers.zero_bubble,
        "zero_bubble_v": pipeline_peers.zero_bubble_v,
    }
)
"""torch's counterpart of each of our schedules."""

TOLERANCE = 0.15  # of a step's time, relative to the simulated one
TIE = 0.01  # simulated times that are as near as this have no order


@dataclass(frozen=True)
class Slept:
    """A schedule's step with layers that sleep: the measured steps, and the simulated one."""

    name: str
    steps: list[sleeping.Step]
    simulated: sleeping.Step

    @property
    def seconds(self) -> float:
        """The seconds of the fastest step: whatever else runs on the machine makes steps longer only."""
        return min(step.seconds for step in self.steps)

    @property
    def ratio(self) -> float:
        """The measured time as a multiple of the simulated one."""
        return self.seconds / self.simulated.seconds

    def __str__(self) -> str:
        bubble = min(step.bubble for step in self.steps)
        return (
            f"{self.name:14} {self.seconds:9.3f} {self.simulated.seconds:9.3f} {self.ratio:7.3f}"
            f" {bubble:8.1%} {self.simulated.bubble:9.1%}"
        )


COLUMNS = "{:14} {:>9} {:>9} {:>9} {:>11}  {}"
TINY = dict(hidden_size=64, word_embed_proj_dim=64, num_attention_heads=4, ffn_dim=128)
HEADER = f"{'':14} {'seconds':>9} {'simulated':>9} {'ratio':>7} {'bubble':>8} {'simulated':>9}"


def sleep(num_ranks: int, work: sleeping.Work, rounds: int) -> list[Slept]:
    """Measure every schedule with layers that sleep, on ranks of their own."""
    pipelines = {name: PipelineConfig(size=num_ranks, schedule=name) for name in PEERS}
    steps = run(sleeping.measure, num_ranks, pipelines, work, rounds)[0]
    return [Slept(name, steps[name], sleeping.simulated(pipeline, work)) for name, pipeline in pipelines.items()]


def problems(found: list[Slept]) -> list[str]:
    """Return where measured steps are not as the simulation says."""
    far = [f"{x.name} takes {x.ratio:.2f} times as long as simulated" for x in found if abs(x.ratio - 1) > TOLERANCE]
    swapped = [
        f"{fast.name} is simulated to be faster than {slow.name}, and is not"
        for fast in found
        for slow in found
        if fast.simulated.seconds < (1 - TIE) * slow.simulated.seconds and fast.seconds >= slow.seconds
    ]
    return far + swapped


def train(rank: int, world_size: int, folder: Path, steps: int, threads: int) -> list[cpu_peers.Result]:
    """Train with each of our schedules and each of torch's, in turns; called on every rank."""
    blocks, layouts = SHAPE["num_hidden_layers"], {}
    for name in PEERS:
        num_stages = PipelineConfig(size=world_size, schedule=name).num_stages
        even = (blocks // num_stages,) * num_stages
        layouts[f"ours {name}"] = dict(parallel=dict(pipeline=dict(size=world_size, schedule=name, layers=even)))
    contest = cpu_peers.Contest("pp", world_size, layouts, tuple(PEERS.values()))
    return cpu_peers.measure(rank, world_size, contest, folder, steps, threads=threads)


def compare_blocks(num_ranks: int, steps: int, threads: int, shape: Mapping[str, int]) -> bool:
    """Train an OPT with every schedule of both, and print a line for each; return whether all losses agree."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), **shape)
        results = run(train, num_ranks, Path(folder), steps, threads)[0]
    of, agree = {result.name: result for result in results}, True
    print(COLUMNS.format("", "ours", "torch's", "ours is", "min-max", "losses"))
    for name, peer in PEERS.items():
        ours, theirs = of[f"ours {name}"], of[peer.__name__]
        ratio, spread = cpu_peers.times_as_fast(ours, theirs)
        different = max(cpu_peers.disagreement(each, results[0]) for each in (ours, theirs))
        agree &= not different
        losses = f"DISAGREE by {different:.1e}" if different else f"{ours.losses[-1]:.5f}"
        speeds = [f"{GLOBAL_BATCH * SEQUENCE / median(each.seconds):.0f}" for each in (ours, theirs)]
        print(COLUMNS.format(name, *speeds, ratio, spread, losses), flush=True)
    return agree


def compare_sleep(num_ranks: int, work: sleeping.Work, rounds: int) -> list[str]:
    """Measure every schedule with layers that sleep, and print a line for each; return what is not as simulated."""
    found = sleep(num_ranks, work, rounds)
    print(HEADER, *found, sep="\n", flush=True)
    return problems(found)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sleep", action="store_true", help="only layers that sleep")
    parser.add_argument("--blocks", action="store_true", help="only real blocks")
    parser.add_argument("--tiny", action="store_true", help="a small model, short sleeps and few steps")
    parser.add_argument("--ranks", type=int, choices=(1, 2, 4), default=4)
    parser.add_argument("--threads", type=int, default=2, help="of each rank, for real blocks")
    parser.add_argument("--steps", type=int, help="timed steps of each schedule")
    parser.add_argument("--seconds", type=float, help="that each of a rank's F, I and W of a microbatch sleeps")
    chosen = parser.parse_args(arguments)
    steps, seconds = chosen.steps or (1 if chosen.tiny else 9), chosen.seconds or (0.004 if chosen.tiny else 0.02)
    found: list[str] = []
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; {chosen.ranks} ranks", flush=True)
    if chosen.sleep or not chosen.blocks:
        found += compare_sleep(chosen.ranks, sleeping.Work(PP_MICROBATCHES, seconds), steps)
    if chosen.blocks or not chosen.sleep:
        print(f"{chosen.threads} threads a rank; tokens/s", flush=True)
        if not compare_blocks(chosen.ranks, steps, chosen.threads, TINY if chosen.tiny else {}):
            found.append("the losses disagree: these were not the same computation")
    sys.exit("\n".join(found) or None)


if __name__ == "__main__":
    main()

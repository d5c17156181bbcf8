"""Jobs that start runs of their own, and have a rank of them killed or stopped: is it named, and does the run go on?"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from unittest.mock import patch

from benchmarks.gpu_jobs import RankSetup, Row
from tests import faults
from tests.killer import Kill, kill_file, killed_file

if TYPE_CHECKING:
    from tests.killed_runs import Layout as Killed

ROOT = Path(__file__).parents[1]
Parallel: TypeAlias = dict[str, dict[str, object]]
"""The section `parallel` of a config."""

OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OF_TORCHRUN = ("TORCHELASTIC_", "GROUP_", "ROLE_")
PATTERNS = {
    "kill": r"rank 1 on \S+ (was killed by signal 9|ended: its process was killed)",
    "stop": r"rank 1 on \S+ is silent: its process has not answered for \d+ s",
}
AFTER_TIMEOUT = 5.0  # seconds in which a silent rank is named at the latest: heartbeats and judgements add up to 4
AFTER_KILL = 5.0
SECONDS_OF_A_RUN = 100.0


@dataclass(frozen=True)
class FaultJob:
    """Runs with a rank that is killed and one that is stopped, and a run that is killed and goes on bit for bit.

    The first rank starts them, on the GPUs of all ranks, which do nothing else meanwhile.
    """

    part: str = "faults"
    name: str = "faults"
    model: str = ""
    seconds: float = 240.0

    def run(self, setup: RankSetup) -> list[Row]:
        """Return a row for each fault: who was named, and after how many seconds."""
        if setup.rank:
            return []
        folder = setup.out / "faults"
        world = setup.world
        acts: list[Callable[[], list[Row]]] = [
            partial(named, "kill", setup, folder / "kill"),
            partial(named, "stop", setup, folder / "stop"),
            *(
                partial(resumed, setup, folder / f"resume_{i}", layout)
                for i, layout in enumerate(resumed_layouts(world))
            ),
        ]
        # A busy CPU would make the seconds longer.
        with (
            patch.dict(os.environ, without_launcher(os.environ), clear=True),
            ThreadPoolExecutor(len(acts) if setup.on_gpu else 1) as threads,
        ):
            return [row for found in threads.map(lambda act: act(), acts) for row in found]


def without_launcher(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables without those of torchrun, which are those of another run."""
    return {k: v for k, v in variables.items() if k not in OF_LAUNCHERS and not k.startswith(OF_TORCHRUN)}


def named(fault: str, setup: RankSetup, folder: Path) -> list[Row]:
    """Have rank 1 of a run killed or stopped in its third backward; return the seconds until it is named."""
    device, timeout = ("auto", 15) if setup.on_gpu else ("cpu", faults.TIMEOUT)
    layout = resumed_layouts(setup.world)[0]

    class Run(faults.Run):
        of = faults.Ranks(setup.world, device, repr(layout), timeout)

    launcher = "nprocs" if fault == "kill" else "torchrun"
    run = Run(folder, fault, "backward", launcher=launcher)
    try:
        seconds = run.seconds_until_named(PATTERNS[fault])
        gone = run.seconds_until_gone()
        text = run.text()
    finally:
        run.clean_up()
    allowed = timeout + AFTER_TIMEOUT if fault == "stop" else AFTER_KILL
    row = Row(
        part="faults", name=f"{fault} of rank 1, {launcher}", seconds_until_named=seconds, seconds_until_gone=gone
    )
    note = f"named after {seconds:.1f} s (timeout {timeout} s), all gone after {gone:.1f} s; {layout}"
    if seconds <= allowed:
        return [row | dict(note=note)]
    last = (text.strip().splitlines() or [""])[-1]
    return [row | dict(note=f"NOT NAMED within {allowed:.0f} s: {note}; last line: {last[:200]}", failed=True)]


def resumed(setup: RankSetup, folder: Path, layout: Parallel) -> list[Row]:
    """Compare all files of a run that was killed, and then resumed, with those of one that nothing interrupted."""
    from tests.killed_runs import VALIDATED, differences
    from tests.killed_runs import Layout as Killed

    own = tuple(f"parallel.{name}={value}" for name, value in layout.items())
    killed = Killed(setup.world, (*own, *VALIDATED, *(() if not setup.on_gpu else ("train.device=auto",))))
    began = time.monotonic()
    codes = [_launch(killed, folder / "whole")]
    microbatches = 4 * 2 ** len(layout) // setup.world  # of two samples in a replica's step
    Kill(1, "Runner._backward", 4 * microbatches + 1).write(folder / "killed")  # in the fifth step of six
    codes.append(_launch(killed, folder / "killed", "--resume", "auto"))
    has_come = killed_file(folder / "killed").exists()
    kill_file(folder / "killed").unlink(missing_ok=True)
    codes.append(_launch(killed, folder / "killed", "--resume", "auto"))
    row = Row(part="faults", name="killed and resumed", exit_codes=codes, seconds=time.monotonic() - began)
    if codes != [0, 5, 0] or not has_come:
        last = (folder / "killed.log").read_text().strip().splitlines()[-1:]
        return [row | dict(note=f"FAILED: exit codes {codes}, wanted [0, 5, 0]; {layout}; {last}", failed=True)]
    found = differences(folder / "killed", folder / "whole")
    if found:
        return [row | dict(note=f"DIFFERS: {'; '.join(found)[:300]}; {layout}", failed=True)]
    return [row | dict(note=f"the same bits in all files; {layout}")]


def resumed_layouts(world: int) -> list[Parallel]:
    """Return 1d in a pipeline, in as many replicas as there are ranks for; on fewer than four ranks each by itself."""
    split: Parallel = dict(tensor=dict(mode="1d", size=2))
    pipe: Parallel = dict(pipeline=dict(size=2))
    return [pipe | split] if world >= 4 else [split, pipe]


def _launch(layout: "Killed", folder: Path, *arguments: str) -> int:
    """Start a run as `--nprocs` does, and return its exit code, or that of SIGKILL where it does not end in time."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "launch.py"), "--nprocs", str(layout.num_ranks), *arguments]
    command += ["--set", *layout.assignments(folder)]
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            return process.wait(SECONDS_OF_A_RUN)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            process.kill()
            process.wait()

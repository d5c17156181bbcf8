"""Runs that are killed again and again, at moments drawn from a seed, end with the model of an uninterrupted run."""

import random
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kill_draws import NUM_KILLS, SEED, SIGNALS, calls_of, draw_kill
from tests.killed_runs import VALIDATED, Layout, assert_same_run, start
from tests.killer import calls_folder, kill_file, killed_file
from tests.test_kills import _leaves_signals_alone, _server  # noqa: F401 (fixtures)

STEPS = "train.steps=30"
OFTEN = ("output.checkpoint_every=3", "output.log_every=30")
KILLS_EACH = 5

RUNS: dict[str, Layout] = {
    "ZeRO 3": Layout(2, ("zero.stage=3", *VALIDATED, *OFTEN, STEPS)),
    "a pipeline": Layout(2, ("parallel.pipeline=2", *VALIDATED, *OFTEN, STEPS)),
    "offloaded ZeRO 2 in bf16": Layout(
        2, ("zero.stage=2", "zero.tensor_placement_policy=cpu", "train.precision=bf16", *OFTEN, STEPS)
    ),
    "fp16 with overflows": Layout(2, ("train.precision=fp16", "model.init_std=4.0", *OFTEN, STEPS)),
}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of an uninterrupted run of each of RUNS, whose calls were counted."""
    found = {}
    for name, layout in RUNS.items():
        found[name] = tmp_path_factory.mktemp("whole") / "run"
        calls_folder(found[name]).mkdir()
        assert start(layout, found[name]) == 0
    return found


def seeds(share: float) -> list[int]:
    """Return the seeds of so many tests of KILLS_EACH kills that a share of all kills is in them."""
    return list(range(SEED, SEED + max(1, round(NUM_KILLS * share / KILLS_EACH))))


@dataclass
class Chain:
    """Runs that are killed one after another: when one comes to its end, it is compared, and the next one begins."""

    draw: random.Random
    references: dict[str, Path]
    folder: Path
    num_runs: int = 0
    name: str = ""

    @property
    def run(self) -> Path:
        return self.folder / f"run_{self.num_runs}"

    @property
    def layout(self) -> Layout:
        return RUNS[self.name]

    def begin(self) -> None:
        self.num_runs += 1
        self.name = self.draw.choice(sorted(RUNS))

    def compare(self) -> None:
        """Assert that the run, which has ended, left what the uninterrupted one did."""
        assert_same_run(self.run, self.references[self.name])
        self.begin()


@pytest.mark.slow
@pytest.mark.parametrize("seed", seeds(0.6))
def test_random_kills_under_nprocs_change_nothing(seed: int, references: dict[str, Path], tmp_path: Path) -> None:
    """Each launch is killed within the first fifth of all calls, and so most launches come some steps further."""
    draw = random.Random(seed)
    chain, num_killed = Chain(draw, references, tmp_path), 0
    chain.begin()
    while num_killed < KILLS_EACH:
        kill = draw_kill(draw, calls_of(references[chain.name]), 1 / KILLS_EACH, SIGNALS)
        print(f"seed {seed}, {chain.name}: {kill}", flush=True)
        kill.write(chain.run)
        code = start(chain.layout, chain.run, "--resume", "auto", more=patience(kill.signal))
        num_killed += killed_file(chain.run).exists()
        assert code in codes_of(kill.signal), code
        if code == 0:
            chain.compare()
    kill_file(chain.run).unlink(missing_ok=True)
    assert start(chain.layout, chain.run, "--resume", "auto") == 0
    chain.compare()


def patience(number: int) -> tuple[str, ...]:
    """Return the assignments for a launch with this signal: a rank that is stopped is named after a few seconds."""
    return ("train.timeout_seconds=5",) if number == signal.SIGSTOP else ()


def codes_of(number: int) -> set[int]:
    """Return the exit codes with which `--nprocs` may end after a rank was sent this signal.

    0: the moment was never reached, or it came when nothing was left to do.
    """
    return {0, {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}.get(signal.Signals(number), 5)}

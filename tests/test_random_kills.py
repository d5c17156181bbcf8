"""Runs that are killed again and again, at moments drawn from a seed, end with the model of an uninterrupted run."""

import random
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from parallel.checkpoint.checkpoint import find_checkpoint, step_of
from tests.kill_draws import NUM_KILLS, SEED, SIGNALS, AfterSeconds, Torchrun, calls_of, draw_kill
from tests.killed_runs import VALIDATED, Layout, differences, lines_of, start
from tests.killer import Kill, calls_folder, kill_file, killed_file
from tests.test_kills import _leaves_signals_alone, _server  # noqa: F401 (fixtures)

STEPS = "train.steps=30"
OFTEN = ("output.checkpoint_every=3", "output.log_every=30")
KILLS_EACH = 5
SECONDS_OF_A_START = 12.0
"""The seconds in which a start of torchrun's, and some steps, fit."""

KILLED = [number for number in SIGNALS if number in (signal.SIGKILL, signal.SIGSEGV)]
"""The signals after which torchrun starts a run again."""


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
        assert differences(self.run, self.references[self.name]) == []
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", seeds(0.4))
def test_random_kills_under_torchrun_change_nothing(seed: int, references: dict[str, Path], tmp_path: Path) -> None:
    """torchrun restarts all ranks when one is killed; a run that a signal has asked to end is started again here.

    Half of the kills come at a moment by the clock, which may be before the first step.
    """
    draw = random.Random(1000 + seed)
    chain, num_killed = Chain(draw, references, tmp_path), 0
    chain.begin()
    while num_killed < KILLS_EACH:
        with Torchrun(chain.layout, chain.run, restarts=KILLS_EACH) as torchrun:
            while num_killed < KILLS_EACH and not torchrun.has_ended():
                kill: Kill | AfterSeconds = draw_kill(draw, calls_of(references[chain.name]), 1 / KILLS_EACH, KILLED)
                if draw.random() < 0.5:
                    kill = AfterSeconds(kill.rank, draw.uniform(0, SECONDS_OF_A_START), kill.signal)
                print(f"seed {seed}, {chain.name}: {kill}", flush=True)
                num_killed += torchrun.send(kill)
            code = torchrun.wait()
        print(torchrun.screen.read_text()[-3000:], "torchrun ended with", code, sep="\n")
        if code == 0:
            chain.compare()
    assert num_killed == KILLS_EACH


NUM_CRASHES = max(1, round(NUM_KILLS * 0.6))
EVERY = 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEED, SEED + max(1, NUM_CRASHES // KILLS_EACH)))
def test_a_crash_while_a_checkpoint_is_written_in_the_background_leaves_a_whole_one(
    seed: int, references: dict[str, Path], tmp_path: Path
) -> None:
    """One rank or all of them are killed at a call of the threads that write. The save before that one was complete."""
    draw = random.Random(2000 + seed)
    chain = Chain(draw, references, tmp_path)
    chain.begin()
    num_killed = 0
    while num_killed < KILLS_EACH:
        calls = calls_of(references[chain.name], "background")
        kill = replace(
            draw_kill(draw, calls, 1 / KILLS_EACH, [signal.SIGKILL]),
            in_background=True,
            all_ranks=draw.random() < 0.5,
        )
        print(f"seed {seed}, {chain.name}: {kill}", flush=True)
        kill.write(chain.run)
        code = start(chain.layout, chain.run, "--resume", "auto")
        num_killed += killed_file(chain.run).exists()
        assert code in (0, 5)
        if code == 0:
            chain.compare()
        elif (last := len(lines_of(chain.run))) >= 2 * EVERY:
            assert step_of(find_checkpoint(str(chain.run))) >= (last // EVERY - 1) * EVERY
    kill_file(chain.run).unlink(missing_ok=True)
    assert start(chain.layout, chain.run, "--resume", "auto") == 0
    chain.compare()

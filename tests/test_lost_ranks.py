"""Runs whose rank is stopped or goes on no more, or whose launcher is killed: a line names the rank, and none is left.

They are real runs of two ranks with `train.timeout_seconds=5`.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import OTHERS, PHASES, Run, is_alive
from tests.patience import patient, wait_until

NAMED, GONE, LAUNCHER_GONE = 10.0, 20.0, 2.0
LAUNCHERS = ("nprocs", "torchrun")
STEP_PHASES = ("forward", "backward", "reduce")


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Run] = []

    def start_one(fault: str, phase: str, **keywords: Any) -> Run:
        started.append(Run(tmp_path, fault, phase, **keywords))
        return started[-1]

    yield start_one
    for run in started:
        run.clean_up()


def drawn_delay(phase: str) -> float:
    return random.uniform(0.0, 0.005 if phase in STEP_PHASES else 0.05)


# -- a rank that is stopped --------------------------------------------------------------------------------------------

QUICK = [("torchrun", "backward", 1)]
SLOW = [
    (launcher, phase, rank)
    for launcher in LAUNCHERS
    for phase in (*PHASES, *OTHERS)
    for rank in (0, 1)
    if (launcher, phase, rank) not in QUICK
    and (phase != "data" or (launcher, rank) == ("torchrun", 0))  # the launcher of --nprocs encodes texts itself
]


@pytest.mark.parametrize(
    ("launcher", "phase", "rank"), [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW)]
)
def test_a_stopped_rank_is_named_within_10_s_and_no_process_is_left_after_20(
    launcher: str, phase: str, rank: int, start: Start
) -> None:
    if phase == "load":
        before = start("nothing", "export", launcher="nprocs")
        assert before.process.wait() == 0, before.text()
        before.forget()
    run = start("stop", phase, launcher=launcher, rank=run_rank(phase, rank), delay=drawn_delay(phase))
    named = run.seconds_until_named(r"rank \d on \S+ is silent: its process has not answered for 5 s")
    gone = run.seconds_until_gone()
    print(f"MEASURED {launcher} {phase} rank {rank}: named {named:.1f} s, gone {gone:.1f} s")
    assert named < patient(NAMED), run.text()
    assert gone < patient(GONE), run.text()
    assert run.text().count(" is silent") == 1
    assert run.process.poll() == (5 if launcher == "nprocs" else 1)


def run_rank(phase: str, rank: int) -> int:
    """Return the rank that commits the fault: both may be the one that encodes the text, whichever comes first."""
    return -1 if phase == "data" else rank


# -- a rank that does not go on ----------------------------------------------------------------------------------------

STUCK = {
    "loop": "in loop_for_ever",
    "sleep": "in <lambda>",
    "lock": "in wait_for_a_lock_that_it_holds",
    "loader": "in load_from_a_hanging_dataset",
    "long call": "its process has not answered for 5 s",
}


@pytest.mark.parametrize("fault", [pytest.param(fault, marks=pytest.mark.slow) for fault in STUCK])
def test_a_rank_that_does_not_go_on_is_named_with_its_line(fault: str, start: Start) -> None:
    run = start(fault, "backward", launcher="torchrun", rank=1)
    named = run.seconds_until_named(r"rank 1 on \S+ is silent: ")
    gone = run.seconds_until_gone()
    print(f"MEASURED torchrun {fault}: named {named:.1f} s, gone {gone:.1f} s")
    line = next(line for line in run.text().splitlines() if " is silent" in line)
    assert STUCK[fault] in line
    assert named < patient(NAMED + 2)
    assert gone < patient(GONE)


@pytest.mark.slow
def test_ranks_that_wait_for_each_other_in_different_groups_are_named_with_their_lines(start: Start) -> None:
    run = start("group", "backward", launcher="torchrun", rank=1)
    named = run.seconds_until_named(r"all ranks have waited for each other for 5 s .*in meet_in_another_group")
    assert named < patient(NAMED + 2), run.text()
    assert run.seconds_until_gone() < patient(GONE)


# -- a launcher that is killed -----------------------------------------------------------------------------------------

KILLED = [
    ("torchrun", "stop"),
    *(
        pytest.param(launcher, fault, marks=pytest.mark.slow)
        for launcher in LAUNCHERS
        for fault in ("nothing", "stop", "long call", "sleep")
        if (launcher, fault) != ("torchrun", "stop")
    ),
]


@pytest.mark.parametrize(("launcher", "fault"), KILLED)
def test_ranks_end_with_their_launcher_within_2_s(launcher: str, fault: str, start: Start) -> None:
    """One rank is stopped, holds the interpreter or sleeps, and the other is blocked in a collective."""
    run = start(fault, "backward", launcher=launcher, rank=1)
    run.seconds_until(lambda: True)
    time.sleep(0.5)  # the other rank reaches its collective, which no file shows
    ranks = run.ranks()
    assert len(ranks) == 2
    run.process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert wait_until(lambda: not any(map(is_alive, ranks)), patient(30.0)), run.text()
    seconds = time.monotonic() - began
    print(f"MEASURED SIGKILL of {launcher}, {fault}: gone {seconds:.2f} s")
    assert seconds < patient(LAUNCHER_GONE)


@pytest.mark.slow
def test_ranks_end_with_the_fork_server_and_the_launcher_says_so(start: Start) -> None:
    run = start("sleep", "backward", launcher="nprocs", rank=1)
    run.seconds_until(lambda: True)
    server = int(Path(f"/proc/{run.ranks()[0]}/stat").read_text().rpartition(")")[2].split()[1])
    assert server != run.process.pid
    os.kill(server, signal.SIGKILL)
    began = time.monotonic()
    run.seconds_until_gone()
    assert time.monotonic() - began < patient(GONE)
    assert run.process.wait() == 5, run.text()
    assert run.text().splitlines()[-1].startswith("the process that starts the ranks was killed")

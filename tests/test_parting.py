"""Ranks that do different things, end or fall silent: each other rank is told by name, within seconds."""

import re
import signal
import socket
from dataclasses import dataclass, replace

import pytest

from parallel.watch.beat import INTERVAL, KILLED, Beat, Observation, Observer
from parallel.watch.judge import LONGEST_PAUSE, SHORTEST_WAIT, Verdict, judge
from parallel.watch.meeting import differences, rank_list
from tests import parting
from tests.parting import Program, one_alone, play
from tests.patience import patient
from tests.tables import Row, rows

SECONDS = 20.0  # within 10 s where cores are free; it ends for certain only because the rank was noticed
KILL = -signal.SIGKILL


@dataclass(frozen=True)
class Scene:
    """A program of two ranks, and the exit codes of rank 0 and rank 1; None: it is stopped."""

    program: Program
    codes: tuple[int, int]


SCENES = {
    "saves a checkpoint alone": Scene(one_alone(parting.save), (1, 1)),
    "loads a checkpoint alone": Scene(one_alone(parting.load), (1, 1)),
    "exports alone": Scene(one_alone(parting.export), (1, 1)),
    "evaluates alone": Scene(one_alone(parting.evaluate), (1, 1)),
    "has a batch less, and then saves": Scene(one_alone(parting.save, after=1), (1, 1)),
    "has a batch less, and then ends": Scene(one_alone(parting.end, after=1), (5, 0)),
    "raises an exception": Scene(one_alone(parting.fail), (5, 1)),
    "is killed, by the system or by `os._exit`": Scene(one_alone(parting.die), (5, KILL)),
    "is stopped, or its host is lost": Scene(one_alone(parting.stop), (5, KILL)),
    "hangs in your own code": Scene(one_alone(parting.hang), (5, 5)),
    "calls a collective of its own that the others do not": Scene(one_alone(parting.meet_nobody), (5, 5)),
    'works for long in a `with context.phase("tokenizing")`': Scene(one_alone(parting.tokenize), (0, 0)),
    "has another config, code, torch or world": Scene(parting.another_config, (1, 1)),
    "refuses its config": Scene(parting.a_bad_config, (1, 1)),
    "has another model": Scene(parting.another_model, (1, 1)),
    "has another learning rate": Scene(parting.another_rate, (1, 1)),
    "ends its program when all is done, later than others": Scene(parting.later, (0, 0)),
}
TABLE = rows("docs/library.md", "Ranks that part")


def test_each_row_of_the_table_is_played() -> None:
    assert [row.what for row in TABLE] == list(SCENES)


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_a_rank_that_parts_is_named_as_the_table_says(row: Row) -> None:
    scene = SCENES[row.what]
    ends = play(scene.program, 2)
    assert tuple(end.code for end in ends) == scene.codes, ends
    assert ends[0].seconds < patient(SECONDS), ends
    words = [text.replace("HOST", socket.gethostname()) for text in re.findall(r"`([^`]+)`", row.answer)]
    told = ends if " on every rank" in row.answer or "every rank, " in row.answer else ends[:1]
    for end in told:
        print(end.errors)
        assert [text for text in words if text not in end.errors and "." not in text[:9]] == []
    if scene.codes == (0, 0):
        assert [end.errors for end in ends] == ["", ""]
    if scene.codes[0] == 5:
        assert ends[0].errors.count("\n") == 1  # one line, without a traceback


# -- the rules ---------------------------------------------------------------------------------------------------------

HERE = Beat(0, "a", step=3, action="a forward")
WAITING = replace(HERE, waits=True, calls=7)
OTHER = Beat(1, "b", step=3, action="a step", place="train.py:31 in main")
LONG, TIMEOUT = 100.0, 60.0


def seen(beat: Beat, *, quiet: float = 0.0, still: float = 0.0) -> Observation:
    return Observation(beat, quiet, still)


WAITS = seen(WAITING, still=SHORTEST_WAIT)
WAITS_LONG = seen(WAITING, still=LONG)
CUT_OFF = seen(replace(HERE, is_cut_off=True))

NOBODY_IS_LOST = {
    "all run": [seen(HERE), seen(OTHER)],
    "all hang, and none waits": [seen(HERE, still=LONG), seen(OTHER, still=LONG)],
    "one waits, and the other works": [WAITS, seen(OTHER)],
    "one waits long, and the other began something else since": [WAITS_LONG, seen(OTHER, still=1)],
    "one has ended well, and the other works": [seen(HERE, still=LONG), seen(replace(OTHER, ended=""))],
    "one was killed, and the other needs it no more": [seen(HERE, still=LONG), seen(replace(OTHER, ended=KILLED))],
    "one has ended well, and the other has just begun to wait": [seen(WAITING), seen(replace(OTHER, ended=""))],
    "one has ended well, one waits for the third": [WAITS, seen(replace(OTHER, ended="")), seen(Beat(2, "b"))],
    "a long save": [WAITS_LONG, seen(replace(OTHER, phase="work on files"), still=LONG)],
    "a quiet rank, and no wait so long": [seen(WAITING, still=TIMEOUT - 1), seen(OTHER, quiet=TIMEOUT - 1)],
    "a broken connection, and all send beats": [CUT_OFF, seen(OTHER, quiet=1.0)],
    "all have ended": [seen(replace(HERE, ended="")), seen(replace(OTHER, ended=KILLED))],
}

LOST = {
    "an exception": ([WAITS, seen(replace(OTHER, ended="KeyError"))], (1,), "ended after step 3 (last call: a step;"),
    "a kill": ([WAITS, seen(replace(OTHER, ended=KILLED))], (1,), "rank 1 on b ended: its process was killed"),
    "an end too soon": ([WAITS, seen(replace(OTHER, ended=""))], (1,), "ended its program after step 3"),
    "an end too soon that cut another off": (
        [CUT_OFF, seen(replace(OTHER, ended="")), seen(Beat(2, "b"))], (1,), "while rank 0 waits for a forward",
    ),
    "a broken connection to a lost host": ([CUT_OFF, seen(OTHER, quiet=LONGEST_PAUSE)], (1,), "does not answer"),
    "a stopped process": ([WAITS_LONG, seen(OTHER, quiet=LONG)], (1,), "its process has not answered for 60 s"),
    "a process that is stopped in a phase": (
        [WAITS_LONG, seen(replace(OTHER, phase="work on files"), quiet=LONG)], (1,), "phase: work on files",
    ),
    "a program that hangs": ([WAITS_LONG, seen(OTHER, still=LONG)], (1,), "at train.py:31 in main"),
    "a deadlock": ([WAITS_LONG, seen(replace(OTHER, waits=True), still=LONG)], (0, 1), "have waited for each other"),
}  # fmt: skip


@pytest.mark.parametrize("observations", NOBODY_IS_LOST.values(), ids=NOBODY_IS_LOST)
def test_a_rank_is_not_missed_while_nobody_waits_for_it_in_vain(observations: list[Observation]) -> None:
    assert judge(observations, TIMEOUT) is None


@pytest.mark.parametrize(("observations", "ranks", "text"), LOST.values(), ids=LOST)
def test_a_rank_that_is_lost_or_silent_is_named(
    observations: list[Observation], ranks: tuple[int, ...], text: str
) -> None:
    verdict = judge(observations, TIMEOUT)
    assert verdict is not None
    assert verdict.ranks == ranks
    assert text in verdict.text
    assert Verdict.from_json(verdict.to_json().encode()) == verdict


def test_the_rank_that_failed_first_is_named_and_not_those_that_failed_because_of_it() -> None:
    failed = seen(replace(OTHER, ended="KeyError: 3", code=2))
    cut_off = seen(replace(OTHER, rank=2, ended="RuntimeError: Connection closed", is_cut_off=True))
    verdict = judge([WAITS, cut_off, failed], TIMEOUT)
    assert verdict is not None
    assert (verdict.ranks, verdict.code) == ((1,), 2)


def test_a_stopped_rank_is_not_said_to_wait_for_another_one() -> None:
    """It is the first of those that wait, as its last beat has it, and its line ended: `rank 0 waits for ...`."""
    stopped = seen(WAITING, quiet=LONG, still=LONG)
    verdict = judge([stopped, seen(replace(OTHER, waits=True), still=LONG)], TIMEOUT)
    assert verdict is not None
    assert verdict.ranks == (0,)
    assert verdict.text.endswith("; rank 1 waits for a step")
    alone = judge([stopped, seen(OTHER)], TIMEOUT)
    assert alone is not None
    assert "waits for" not in alone.text


def test_of_many_ranks_eight_are_named_and_the_others_counted() -> None:
    verdict = judge([WAITS, *(seen(Beat(rank, "b", ended=KILLED)) for rank in range(1, 21))], TIMEOUT)
    assert verdict is not None
    assert len(verdict.ranks) == 20
    assert "rank 8 on b" in verdict.text
    assert "rank 9 on b" not in verdict.text
    assert "and 12 more" in verdict.text


def test_an_observer_goes_by_its_own_clock_and_counts_no_time_in_which_it_was_suspended() -> None:
    observer = Observer()
    beat = replace(OTHER, tick=1)
    assert observer.observe([beat], 0.0) == [seen(beat)]
    assert observer.observe([beat], 1.0) == [seen(beat, quiet=1.0, still=1.0)]
    ticked = replace(beat, tick=2)
    assert observer.observe([ticked], 1.0) == [seen(ticked, still=2.0)]
    assert observer.observe([ticked], 3600.0) == [seen(ticked, quiet=2 * INTERVAL, still=2.0 + 2 * INTERVAL)]
    busy = replace(ticked, tick=3, calls=1)
    assert observer.observe([busy], 1.0) == [seen(busy)]


def test_different_facts_are_listed_by_key_with_the_ranks_of_each_value() -> None:
    alike = {"optimizer.lr": 0.1, "world size": 4}
    assert differences([alike] * 4) == []
    assert differences([alike, alike, alike | {"optimizer.lr": 0.5}, alike | {"optimizer.lr": 0.5}]) == [
        "optimizer.lr: the ranks were started with different values: 0.1 on ranks 0, 1, 0.5 on ranks 2, 3."
    ]
    assert "nothing on rank 1" in differences([alike, {"world size": 4}])[0]
    assert rank_list(range(20)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"

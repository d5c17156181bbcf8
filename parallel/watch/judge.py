"""The rules by which a rank is called lost or silent: a pure function of what was seen of all ranks.

A rank is missed only where another one waits for it. So a program may end on one rank sooner than on the others, and a
rank may take as long as it likes while nobody needs it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from parallel.errors import ExitCode
from parallel.watch.beat import Beat, Observation

SHORTEST_WAIT = 2.0
"""The seconds after which a rank that is in a collective is taken to wait for a rank that has ended."""

LONGEST_PAUSE = 5.0
"""The seconds without a beat after which a rank whose connection broke is taken to have ended."""

NAMED_AT_ONCE = 8
"""The ranks that a message names; it counts the others."""


@dataclass(frozen=True)
class Verdict:
    """The ranks that are lost or silent, what is said of them, and the exit code of the others.

    `stopped` are those of them whose process does not answer, and which a rank of the same host has to end.
    """

    ranks: tuple[int, ...]
    text: str
    code: int = ExitCode.LOST
    stopped: tuple[int, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: bytes) -> "Verdict":
        fields = json.loads(text)
        return cls(tuple(fields["ranks"]), fields["text"], fields["code"], tuple(fields["stopped"]))


def judge(seen: Sequence[Observation], timeout: float, *, have_met: bool = True) -> Verdict | None:
    """Return who is lost or silent, or None where all is well as far as can be seen.

    In this order: a rank that ended by an error or was killed, a rank that ended its program too early, a rank whose
    connection broke and that sends no beat, and after `timeout` seconds the ranks whose process does not answer,
    whatever they are at, and those whose program does not go on. Until the ranks have met, each needs all others, so
    that only processes that do not answer are lost; `meet` names a rank that has ended.
    """
    living = [one for one in seen if one.beat.ended is None]
    if not have_met:
        return _stopped(living, timeout)
    waiting = [one for one in living if _waits(one)]
    if not waiting:
        return None
    return (
        _failed(seen, waiting)
        or _left(seen, living, waiting)
        or _cut_off(living)
        or _stopped(living, timeout, waiting)
        or _silent(living, timeout)
    )


def _waits(one: Observation) -> bool:
    return one.beat.is_cut_off or (one.beat.waits and one.still >= SHORTEST_WAIT)


def _failed(seen: Sequence[Observation], waiting: Sequence[Observation]) -> Verdict | None:
    """Return the verdict on ranks that were killed or ended by an error of their own."""
    failed = [one.beat for one in seen if one.beat.ended]
    first = [beat for beat in failed if not beat.is_cut_off] or failed
    if not first:
        return None
    text = _list([beat.end for beat in first])
    return Verdict(_ranks(first), f"{text}; {_waits_for(waiting)}", first[0].code)


def _left(seen: Sequence[Observation], living: Sequence[Observation], waiting: Sequence[Observation]) -> Verdict | None:
    """Return the verdict on ranks whose program ended without an error, while others still need them.

    Others need them for certain where a connection broke, or where everyone else waits.
    """
    left = [one.beat for one in seen if one.beat.ended == ""]
    is_needed = len(waiting) == len(living) or any(one.beat.is_cut_off for one in waiting)
    if not left or not is_needed:
        return None
    text = _list([f"{beat.name} ended its program {beat.position}" for beat in left])
    return Verdict(_ranks(left), f"{text}, while {_waits_for(waiting)}")


def _cut_off(living: Sequence[Observation]) -> Verdict | None:
    """Return the verdict on ranks without a beat since another's connection broke: their hosts or processes ended."""
    gone = [one.beat for one in living if one.quiet >= LONGEST_PAUSE]
    if not gone or not any(one.beat.is_cut_off for one in living):
        return None
    text = _list([f"{beat.name} ended {beat.position}: its connection broke and it does not answer" for beat in gone])
    return Verdict(_ranks(gone), text, stopped=_ranks(gone))


def _stopped(
    living: Sequence[Observation], timeout: float, waiting: Sequence[Observation] | None = None
) -> Verdict | None:
    """Return the verdict on ranks whose process has not answered for `timeout` seconds, whatever they were at.

    A stopped rank may be one of `waiting`, as its last beat has it; another one tells what is waited for. `waiting` is
    None until the ranks have met.
    """
    stopped = [one.beat for one in living if one.quiet >= timeout]
    if not stopped:
        return None
    others = [one for one in waiting or () if one.beat not in stopped]
    who_waits = "all ranks wait for it to start" if waiting is None else _waits_for(others) if others else ""
    what = f"is silent: its process has not answered {_limit(timeout)}, and was last seen"
    text = _list([f"{beat.name} {what} {beat.position}" for beat in stopped])
    return Verdict(_ranks(stopped), "; ".join(filter(None, [text, who_waits])), stopped=_ranks(stopped))


def _silent(living: Sequence[Observation], timeout: float) -> Verdict | None:
    """Return the verdict on ranks that others have waited for during `timeout` seconds, and whose process answers."""
    waiting = [one for one in living if one.beat.waits and one.still >= timeout]
    if not waiting:
        return None
    stuck = [one.beat for one in living if not one.beat.waits and not one.beat.phase and one.still >= timeout]
    limit = _limit(timeout)
    if stuck:
        text = _list([f"{beat.name} is silent: it has not gone on {limit} {beat.position}" for beat in stuck])
    elif len(waiting) == len(living):
        positions = _list([f"{one.beat.name} {one.beat.position}" for one in living])
        return Verdict(
            _ranks([one.beat for one in living]), f"all ranks have waited for each other {limit}: {positions}"
        )
    else:
        return None
    return Verdict(_ranks(stuck), f"{text}; {_waits_for(waiting)}")


def _limit(timeout: float) -> str:
    return f"for {timeout:g} s (train.timeout_seconds)"


def _waits_for(waiting: Sequence[Observation]) -> str:
    """Return what the first of the ranks that wait is waiting for."""
    beat = waiting[0].beat
    return f"rank {beat.rank} waits for {beat.action or 'another rank'}"


def _ranks(beats: Sequence[Beat]) -> tuple[int, ...]:
    return tuple(beat.rank for beat in beats)


def _list(texts: Sequence[str]) -> str:
    more = len(texts) - NAMED_AT_ONCE
    return "; ".join([*texts[:NAMED_AT_ONCE], *([f"and {more} more"] if more > 0 else [])])

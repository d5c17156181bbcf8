"""The order of one rank's computes: the common form of the pipeline schedules.

A rank runs a few forwards first (the warm-up), then a forward and a backward in turn, then the backwards that are left
(the cool-down). Schedules differ in which stage's microbatch comes next, in the length of the warm-up, and in how long
the gradients of weights are put off.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import TypeAlias

from parallel.config import PipelineConfig
from parallel.plan.plan import Action, Op, Plan

Compute: TypeAlias = tuple[int, int]
"""A stage and a microbatch."""


@dataclass(frozen=True, slots=True)
class Order:
    """The computes of one rank: `forwards` and `backwards` in order, of which `num_warmup` forwards come first."""

    forwards: Sequence[Compute]
    backwards: Sequence[Compute]
    num_warmup: int

    def whole(self) -> Iterator[Action]:
        """Yield the computes with whole backwards."""
        for forward, backward in self._pairs():
            if forward is not None:
                yield Action(Op.F, *forward)
            if backward is not None:
                yield Action(Op.B, *backward)

    def halved(self, *, steady: int, cooldown: int) -> Iterator[Action]:
        """Yield the computes with backwards in two halves, an I and later its W.

        After an I comes the oldest W that has yet to run, if more than this many wait, in the steady state and in the
        cool-down.
        """
        waiting: deque[Compute] = deque()
        for number, (forward, backward) in enumerate(self._pairs()):
            if forward is not None:
                yield Action(Op.F, *forward)
            if backward is not None:
                yield Action(Op.I, *backward)
                waiting.append(backward)
                if len(waiting) > (steady if number < len(self.forwards) else cooldown):
                    yield Action(Op.W, *waiting.popleft())
        yield from (Action(Op.W, *compute) for compute in waiting)

    def _pairs(self) -> Iterator[tuple[Compute | None, Compute | None]]:
        yield from ((forward, None) for forward in islice(self.forwards, self.num_warmup))
        yield from zip_longest(islice(self.forwards, self.num_warmup, None), self.backwards)


def numbered(stages: Iterable[int]) -> list[Compute]:
    """Return a stage and a microbatch for each of these stages: each stage takes the microbatches in order."""
    counts: Counter[int] = Counter()
    computes = []
    for stage in stages:
        computes.append((stage, counts[stage]))
        counts[stage] += 1
    return computes


def stages_of_ranks(schedule: str, num_ranks: int, chunks: int) -> tuple[tuple[int, ...], ...]:
    """Return the stages on each rank of the pipe, in order, as the config places them for this schedule."""
    return PipelineConfig(size=num_ranks, schedule=schedule, chunks=chunks).stages


def plan_of_computes(ranks: Iterable[Iterable[Action]], num_stages: int, num_microbatches: int) -> Plan:
    """Return the plan of these computes; those of microbatches which the step does not have are left out."""
    kept = (tuple(action for action in actions if action.microbatch < num_microbatches) for actions in ranks)
    return Plan(tuple(kept), num_stages, num_microbatches)

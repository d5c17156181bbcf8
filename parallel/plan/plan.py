"""A pipeline's plan as data: for every rank of the pipe, the list of actions that it executes, in order.

    for action in plan.ranks[rank]:
        ...

Actions are those of torch.distributed.pipelining: F, B, I, W, and the transfers between stages.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from typing import NamedTuple, TypeAlias

Place: TypeAlias = tuple[int, int]
"""A rank, and the position of one of its actions; the number of its actions is the place after the last one."""


class PlanError(ValueError):
    """The error of a plan that computes something wrong, or in which a rank waits forever.

    `places` are where, the first of them above all; `grid` are the lines that show it.
    """

    def __init__(self, message: str, places: Sequence[Place] = (), grid: Iterable[str] = ()) -> None:
        super().__init__("\n".join([message, *grid]))
        self.message, self.places = message, tuple(places)


class Op(Enum):
    """The kinds of actions: forward and backward of a stage, and the transfers between stages.

    A backward is one action, B, or two: I computes the gradient of the stage's input, for which the previous stage
    waits, and W those of its weights, for which only the update waits (Qi et al. 2023, arXiv 2401.10241, section 2).
    Activations are sent forward (_F, to the next stage), gradients of inputs are sent back (_B, to the previous one).
    """

    F = "F"
    B = "B"
    I = "I"  # noqa: E741
    W = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"

    def __init__(self, name: str) -> None:
        self.is_send = name.startswith("SEND")
        self.is_transfer = self.is_send or name.startswith("RECV")
        self.is_forward = name.endswith("F")
        self.makes_input_gradient = name in ("B", "I")  # for which the previous stage waits


class Result(NamedTuple):
    """The result of a compute: the output of a stage, or the gradient of its input, whether B or I computes it."""

    is_forward: bool
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{'F' if self.is_forward else 'B'}{self.stage}.{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Action:
    """One action of a rank for one microbatch.

    `stage` is the stage that computes, or whose own input or output is transferred: `SEND_F0.3>1` (stage 0's output for
    microbatch 3 goes to rank 1) matches `RECV_F1.3<0` (stage 1's input comes from rank 0). `peer` is the rank at the
    other end of a transfer.
    """

    op: Op
    stage: int
    microbatch: int
    peer: int | None = None

    @property
    def result(self) -> Result | None:
        """The result of the action, which others use; None for W and for transfers."""
        if self.op.is_transfer or self.op is Op.W:
            return None
        return Result(self.op.is_forward, self.stage, self.microbatch)

    @property
    def payload(self) -> Result:
        """The result that is transferred; it identifies the message, and is the same at both ends."""
        assert self.op.is_transfer, f"{self} carries nothing"
        return Result(self.op.is_forward, self.stage if self.op.is_send else self._source, self.microbatch)

    def other_end(self, rank: int) -> "Action":
        """Return the action at the other end of a transfer of this rank."""
        other = Op(f"{'RECV' if self.op.is_send else 'SEND'}{self.op.value[4:]}")
        step = 1 if self.op.is_forward is self.op.is_send else -1
        return Action(other, self.stage + step, self.microbatch, rank)

    def needs(self, num_stages: int) -> tuple[Result, ...]:
        """Return the results that the action uses, of the stages of a model."""
        if self.op.is_transfer:
            return (self.payload,) if self.op.is_send else ()
        if self.op is Op.W:
            return (Result(False, self.stage, self.microbatch),)
        own = () if self.op.is_forward else (Result(True, self.stage, self.microbatch),)
        if not 0 <= self._source < num_stages:
            return own
        return (*own, Result(self.op.is_forward, self._source, self.microbatch))

    @property
    def _source(self) -> int:
        """The stage from which the input comes: the one before, and in a backward the one after."""
        return self.stage + (-1 if self.op.is_forward else 1)

    def __str__(self) -> str:
        name = f"{self.op.value}{self.stage}.{self.microbatch}"
        if self.peer is None:
            return name
        return f"{name}{'>' if self.op.is_send else '<'}{self.peer}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The actions of each rank of the pipe in one step (`ranks[r]`), for all stages and microbatches."""

    ranks: tuple[tuple[Action, ...], ...]
    num_stages: int
    num_microbatches: int

    def stages(self) -> tuple[tuple[int, ...], ...]:
        """Return the stages of each rank, in order."""
        return tuple(tuple(sorted({action.stage for action in actions})) for actions in self.ranks)

    @property
    def begins_in_order(self) -> bool:
        """True if the first backward of each stage is that of its first forward, as in all but schedules of files."""
        first: dict[tuple[int, bool], int] = {}
        for action in (action for actions in self.ranks for action in actions if action.op in (Op.F, Op.B, Op.I)):
            first.setdefault((action.stage, action.op.is_forward), action.microbatch)
        return all(first.get((stage, True)) == microbatch for (stage, _), microbatch in first.items())

    def rank_of_stage(self) -> dict[int, int]:
        """Return the rank that computes each stage."""
        return {
            action.stage: rank for rank, actions in enumerate(self.ranks) for action in actions if action.op is Op.F
        }


def group_transfers(actions: Iterable[Action]) -> Iterator[Action | tuple[Action, ...]]:
    """Yield the steps of one rank: each compute by itself, adjacent transfers as one tuple, which is posted at once."""
    for is_transfer, group in groupby(actions, key=lambda action: action.op.is_transfer):
        if is_transfer:
            yield tuple(group)
        else:
            yield from group

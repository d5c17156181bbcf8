"""A pipeline's plan as data: for every rank of the pipe, the list of actions that it executes, in order.

    for action in plan.ranks[rank]:
        ...

Actions are those of torch.distributed.pipelining: F, B, I, W, and the transfers between stages.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import groupby


class PlanError(ValueError):
    """The error of a plan that computes something wrong, or in which a rank waits forever."""


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
        self.makes_input_gradient = name in ("B", "I")  # for which the previous stage waits


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
    def payload(self) -> "Action":
        """The compute whose result is transferred; it identifies the message, and is the same at both ends."""
        match self.op:
            case Op.SEND_F:
                return Action(Op.F, self.stage, self.microbatch)
            case Op.RECV_F:
                return Action(Op.F, self.stage - 1, self.microbatch)
            case Op.SEND_B:
                return Action(Op.B, self.stage, self.microbatch)
            case Op.RECV_B:
                return Action(Op.B, self.stage + 1, self.microbatch)
        raise AssertionError(f"{self} carries nothing")

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

"""Pipeline schedules as data: for every rank of the pipe, the list of actions that it executes, in order.

A generator (`gpipe`, `one_f_one_b`, `forward_only`) orders the computes; `with_transfers` adds the sends and receives
between them; `validate.validate` proves the result; `timeline.simulate` times it; the runner executes it, one action
after the other:

    plan = with_transfers(SCHEDULES["1f1b"](num_stages, num_microbatches))
    for action in plan.ranks[rank]:
        ...

The proof and the simulation go in steps: a compute, or all the transfers between two computes (`group_transfers`).
(torch.distributed.pipelining has the same two stages: a compute schedule, which is lowered to one with communication.)

In the pictures a row is a rank, time runs to the right, `F2` is the forward of microbatch 2, dots are idle time (the
bubble), and forward and backward are drawn equally long.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import groupby


class PlanError(ValueError):
    """The error of a plan that computes something wrong, or in which a rank waits forever."""


class Op(Enum):
    """The kinds of actions: forward and backward of a stage, and the transfers between stages.

    Activations are sent forward (_F, to the next stage), gradients are sent back (_B, to the previous one).
    """

    F = "F"
    B = "B"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"

    @property
    def is_transfer(self) -> bool:
        """True for an action that sends or receives."""
        return self not in (Op.F, Op.B)

    @property
    def is_send(self) -> bool:
        """True for an action that sends."""
        return self in (Op.SEND_F, Op.SEND_B)


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


def gpipe(num_stages: int, num_microbatches: int) -> Plan:
    """Return the plan of all forwards, then all backwards: a stage holds the activations of all microbatches at once.

        rank 0  F0 F1 F2 F3 .. .. .. .. B0 B1 B2 B3
        rank 1  .. F0 F1 F2 F3 .. .. B0 B1 B2 B3 ..
        rank 2  .. .. F0 F1 F2 F3 B0 B1 B2 B3 .. ..

    Huang et al. 2019, "GPipe", section 2.3. The paper draws the backwards in reverse order. This order has the same
    bubble, and sums gradients in the order of 1F1B and of plain accumulation.
    """
    forwards, backwards = [Op.F] * num_microbatches, [Op.B] * num_microbatches
    return _one_stage_per_rank([forwards + backwards] * num_stages, num_microbatches)


def one_f_one_b(num_stages: int, num_microbatches: int) -> Plan:
    """Return the plan of a warm-up, then one forward and one backward in turn.

    Stage s holds the activations of at most num_stages - s microbatches.

        rank 0  F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3
        rank 1  .. F0 F1 .. B0 F2 B1 F3 B2 .. B3 ..
        rank 2  .. .. F0 B0 F1 B1 F2 B2 F3 B3 .. ..

    Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM",
    section 2.2.1 (PipeDream-Flush). On one stage this is gradient accumulation: F0 B0 F1 B1 ...
    """
    orders = []
    for stage in range(num_stages):
        num_warmup = min(num_stages - stage - 1, num_microbatches)
        steady = [Op.F, Op.B] * (num_microbatches - num_warmup)
        orders.append([Op.F] * num_warmup + steady + [Op.B] * num_warmup)
    return _one_stage_per_rank(orders, num_microbatches)


def forward_only(num_stages: int, num_microbatches: int) -> Plan:
    """Return the plan of an evaluation: forwards alone, of which nothing is kept for a backward.

    rank 0  F0 F1 F2 F3 .. ..
    rank 1  .. F0 F1 F2 F3 ..
    rank 2  .. .. F0 F1 F2 F3
    """
    return _one_stage_per_rank([[Op.F] * num_microbatches] * num_stages, num_microbatches)


SCHEDULES: dict[str, Callable[[int, int], Plan]] = {"gpipe": gpipe, "1f1b": one_f_one_b}


def _one_stage_per_rank(orders: list[list[Op]], num_microbatches: int) -> Plan:
    """Return the plan in which rank r holds stage r and runs `orders[r]`.

    Forwards take the microbatches in order, and so do backwards.
    """
    ranks = []
    for stage, order in enumerate(orders):
        upcoming = {Op.F: iter(range(num_microbatches)), Op.B: iter(range(num_microbatches))}
        ranks.append(tuple(Action(op, stage, next(upcoming[op])) for op in order))
    return Plan(tuple(ranks), len(orders), num_microbatches)


def with_transfers(plan: Plan) -> Plan:
    """Return the plan with a receive just before each compute that needs an input, and a send just after its output.

    Between two stages on one rank nothing is sent. All transfers between two computes are adjacent, so that
    `group_transfers` makes one step of them. In steady 1F1B a stage posts {send an activation, receive a gradient} to
    the next stage, then {send the gradient, receive an activation} to the previous one: both ends of a link post both
    directions together, and neither has to buffer for the other.
    """
    rank_of_stage = plan.rank_of_stage()
    ranks = []
    for rank, computes in enumerate(plan.ranks):
        actions: list[Action] = []
        for compute in computes:
            send, receive, step = (Op.SEND_F, Op.RECV_F, 1) if compute.op is Op.F else (Op.SEND_B, Op.RECV_B, -1)
            source = rank_of_stage.get(compute.stage - step, rank)
            target = rank_of_stage.get(compute.stage + step, rank)
            if source != rank:
                actions.append(Action(receive, compute.stage, compute.microbatch, source))
            actions.append(compute)
            if target != rank:
                actions.append(Action(send, compute.stage, compute.microbatch, target))
        ranks.append(tuple(actions))
    return Plan(tuple(ranks), plan.num_stages, plan.num_microbatches)


def group_transfers(actions: Iterable[Action]) -> Iterator[Action | tuple[Action, ...]]:
    """Yield the steps of one rank: each compute by itself, adjacent transfers as one tuple, which is posted at once."""
    for is_transfer, group in groupby(actions, key=lambda action: action.op.is_transfer):
        if is_transfer:
            yield tuple(group)
        else:
            yield from group

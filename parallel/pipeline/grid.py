"""The grid of a plan that is refused, with the place marked that is wrong."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TypeAlias

from parallel.pipeline.plan import Plan, PlanError
from parallel.pipeline.timeline import Costs, starts_of

Place: TypeAlias = tuple[int, int]
"""A rank, and the position of one of its actions; the number of its actions is the place after the last one."""

BEFORE, AFTER = 8, 4  # columns that are shown on both sides of the first place
MOST_LINES = 12  # about ranks that wait
AROUND = 5  # ranks that are shown on both sides of it


def refusal(message: str, plan: Plan, *places: Place, ended: Collection[int] | None = None) -> PlanError:
    """Return the error with this message, and below it the grid of the plan's computes with these places marked.

    A row is a rank, and a column the time of one compute. Where a place is a transfer, the compute after it is marked.
    A large plan is cut around the first place. With `ended`, the plan could not run to its end: of each rank but these
    no computes after its place are shown.
    """
    return PlanError("\n".join([message, *_Grid(plan, dict(reversed(places)), ended).lines(places[0][0])]))


def checked_starts(plan: Plan, costs: Costs) -> list[list[float]]:
    """Return when each rank's actions start, if messages are buffered.

    Raises PlanError, with the grid, where computes wait for each other forever.
    """
    starts = starts_of(plan, costs)
    stuck = [(rank, len(row)) for rank, row in enumerate(starts) if len(row) < len(plan.ranks[rank])]
    if stuck:
        lines = [f"  rank {rank} waits for the input of {plan.ranks[rank][position]}" for rank, position in stuck]
        ended = {*range(len(starts))} - {rank for rank, _ in stuck}
        raise refusal("\n".join(["the plan waits forever:", *shortened(lines)]), plan, *stuck, ended=ended)
    return starts


def shortened(lines: list[str]) -> list[str]:
    """Return the first of these lines, one for each rank, and how many are left out."""
    left_out = len(lines) - MOST_LINES
    return lines if left_out <= 0 else [*lines[:MOST_LINES], f"  and {left_out} other ranks"]


class _Grid:
    """The computes of a plan by rank and column."""

    def __init__(self, plan: Plan, marked: dict[int, int], ended: Collection[int] | None) -> None:
        num_stages = 1 + max(action.stage for actions in plan.ranks for action in actions)  # more, if some are strays
        started = starts_of(replace(plan, num_stages=num_stages), Costs(1, 0.5, 0.5))
        self.rows: list[dict[int, str]] = []
        self.marks: dict[int, int] = {}
        for rank, (actions, starts) in enumerate(zip(plan.ranks, started, strict=True)):
            row: dict[int, str] = {}
            column = 0
            for position, action in enumerate(actions):
                if action.op.is_transfer:
                    continue
                if position < len(starts):
                    column = max(column, int(starts[position]))
                row[column] = str(action)
                if rank not in self.marks and position >= marked.get(rank, len(actions)):
                    self.marks[rank] = column
                    if ended is not None:
                        break
                column += 1
            if rank in marked:
                self.marks.setdefault(rank, column)
            self.rows.append(row)

    def lines(self, rank: int) -> Iterator[str]:
        """Yield a line for each rank around this one, and marks below those that are marked."""
        first = max(0, self.marks[rank] - BEFORE)
        end = max(max(self.marks.values()) + 1 if len(self.marks) > 1 else 0, self.marks[rank] + 1 + AFTER)
        columns = range(first, min(end, first + BEFORE + 1 + 2 * AFTER))
        width = max((len(row.get(column, "")) for row in self.rows for column in columns), default=0)
        shown = range(max(0, rank - AROUND), min(len(self.rows), rank + AROUND + 1))
        if shown[0] > 0:
            yield "…"
        for each in shown:
            name = f"rank {each:>{len(str(shown[-1]))}} {'…' if first else ' '} "
            cells = [self.rows[each].get(column, "." * width).ljust(width) for column in columns]
            yield (name + " ".join(cells)).rstrip(" .")
            if (mark := self.marks.get(each)) is not None and mark in columns:
                yield " " * (len(name) + (mark - first) * (width + 1)) + "^" * width
        if shown[-1] + 1 < len(self.rows):
            yield "…"

"""The checks that a table is a schedule: every compute is there once, and no rank waits forever."""

from parallel.config.schedule_table import SHOWN_ROWS, Cell, Place, ScheduleTable, needs_of, steps_of
from parallel.errors import ColonnadeError


class TableError(ColonnadeError):
    """The error of a table that is no schedule: what is wrong, at which place, with the grid."""

    def __init__(self, wrong: str, text: str, *places: Place) -> None:
        row, cell = places[0]
        super().__init__(f"row {row + 1} (rank {row}), cell {cell + 1}: {wrong}\n{text}")


def check_table(table: ScheduleTable) -> None:
    """Raise TableError unless the table is a schedule that ends, and that computes everything once."""
    _check_ranks(table)
    _check_neighbours(table)
    _check_once(table)
    _check_complete(table)
    _check_order(table)


def _check_ranks(table: ScheduleTable) -> None:
    """Check that each stage is on one rank, that none is left out, and that each rank has as many as the others."""
    places: dict[int, Place] = {}
    for r, row in enumerate(table.rows):
        if not table.stages[r]:
            raise TableError("the rank has no action, and each has a stage at least.", table.grid((r, 0)), (r, 0))
        for c, cell in enumerate(row):
            if cell is None:
                continue
            first = places.setdefault(cell.stage, (r, c))
            if first[0] != r:
                wrong = f"{cell} is of stage {cell.stage}, which rank {first[0]} has. A stage is on one rank."
                raise TableError(wrong, table.grid((r, c), first), (r, c))
    missing = next(stage for stage in range(len(places) + 1) if stage not in places)
    if missing < len(places):
        stage = max(places)
        wrong = f"there is a stage {stage} and no stage {missing}. Stages count from 0, without a gap."
        raise TableError(wrong, table.grid(places[stage]), places[stage])
    for r in range(len(table.rows)):
        if len(table.stages[r]) != table.num_chunks:
            held = f"{len(table.stages[r])} of the stages, and rank 0 {table.num_chunks}"
            wrong = f"the rank holds {held}. Each holds equally many."
            raise TableError(wrong, table.grid((r, 0)), (r, 0))


def _check_neighbours(table: ScheduleTable) -> None:
    """Check that consecutive stages are on one rank or on neighbours, since messages are sent to these alone."""
    size, first = len(table.rows), dict[int, Place]()
    for place, cell in table.cells():
        first.setdefault(cell.stage, place)
    for stage in range(1, len(first)):
        before, after = first[stage - 1][0], first[stage][0]
        if (after - before) % size not in (0, 1, size - 1):
            wrong = (
                f"stage {stage} is on rank {after}, and stage {stage - 1} on rank {before}. Consecutive stages are on"
                f" one rank or on neighbours; ranks 0 and {size - 1} are neighbours too."
            )
            raise TableError(wrong, table.grid(first[stage]), first[stage])


def _check_once(table: ScheduleTable) -> None:
    """Check that no compute runs twice, and that a backward is either B, or I and W."""
    places: dict[Cell, Place] = {}
    for place, cell in table.cells():
        if cell in places:
            wrong = f"{cell} runs twice, first in cell {places[cell][1] + 1}."
            raise TableError(wrong, table.grid(place, places[cell]), place)
        places[cell] = place
    for cell, place in places.items():
        if cell.op in "IW":
            whole, other = cell._replace(op="B"), cell._replace(op="W" if cell.op == "I" else "I")
            if whole in places:
                wrong = f"{cell} is a part of {whole}, which runs too. A backward is B, or I and W."
                raise TableError(wrong, table.grid(place, places[whole]), place)
            if other not in places:
                raise TableError(f"{cell} needs {other}, which is missing.", table.grid(place), place)


def _check_complete(table: ScheduleTable) -> None:
    """Check that every microbatch passes every stage, forward and backward."""
    forwards = {cell[::2]: place for place, cell in table.cells() if cell.op == "F"}
    backwards = {cell[::2]: place for place, cell in table.cells() if cell.op in "BI"}
    for done, needed, op in ((forwards, backwards, "F"), (backwards, forwards, "B")):
        for key, place in needed.items():
            if key not in done:
                wrong = f"microbatch {key[1]} of stage {key[0]} has no {op}: {key[0]}{op}{key[1]} is missing."
                raise TableError(wrong, table.grid(place), place)
    total = table.num_microbatches
    for r in range(len(table.rows)):
        for stage in table.stages[r]:
            missing = next((k for k in range(total) if (stage, k) not in forwards), None)
            if missing is not None:
                wrong = f"microbatch {missing} is missing on stage {stage}, of {total} that the file has."
                raise TableError(wrong, table.grid((r, 0)), (r, 0))


def _check_order(table: ScheduleTable) -> None:
    """Check that no rank waits forever: what a compute needs is computed before, on its own rank and on the others."""
    queues = [[cell for cell in row if cell is not None] for row in table.rows]
    done, positions = steps_of(queues)
    stuck = [queue[position] for queue, position in zip(queues, positions, strict=True) if position < len(queue)]
    if not stuck:
        return
    places = [place for place, cell in table.cells() if cell in stuck]
    every = {cell for _, cell in table.cells()}
    waits = [
        f"{cell} waits for {' and '.join(str(need) for need in needs_of(cell, every) if need not in done)}"
        for cell in stuck
    ]
    rest = f" and {len(waits) - SHOWN_ROWS} more ranks wait" if len(waits) > SHOWN_ROWS else ""
    wrong = f"the schedule waits forever: {'; '.join(waits[:SHOWN_ROWS])}{rest}."
    raise TableError(wrong, table.grid(*places), *places)

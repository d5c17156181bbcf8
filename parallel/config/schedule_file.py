"""A pipeline's schedule in a file: the CSV of computes that torch.distributed.pipelining writes and reads.

    0F0,0F1,,,0B0,0B1
    ,1F0,1B0,1F1,1B1

Row r is rank r, a cell is a stage, an op and a microbatch, and an empty cell is idle time. B is a whole backward; I
computes the gradient of the stage's input, and W, later, those of its weights. Rows may have different lengths. (It is
the format "compute_only" of `_PipelineScheduleRuntime._load_csv`.)
"""

import csv
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from parallel.errors import ColonnadeError, ConfigError, shown
from parallel.regular_file import read_bytes, with_key

KEY = "parallel.pipeline.schedule"
MOST_BYTES = 1 << 24  # of a file: a step of 64 ranks and 16,000 microbatches
CELL = re.compile(r"(\d{1,7})(F|B|I|W)(\d{1,7})")
SHOWN_ROWS, SHOWN_CELLS = 4, 8  # of the grid in a message, on each side of the marked place
LONGEST_CELL = 16  # characters in that grid

TRANSFERS = "transfers follow from the computes: leave it out, as torch's format compute_only does"
SHARDING = "zero.stage decides when parameters are gathered and gradients are summed: leave it out"
NOT_RUN: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("SEND_F", "RECV_F", "SEND_B", "RECV_B"), TRANSFERS),
        **dict.fromkeys(("UNSHARD", "RESHARD", "REDUCE_GRAD"), SHARDING),
        "OVERLAP_F_B": "a forward and a backward run one after the other: write each into a cell of its own",
    }
)
"""The other actions that torch's pipelining has, and what to do about them."""


class Cell(NamedTuple):
    """A compute in a table: `op` is F, B, I or W."""

    stage: int
    op: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.microbatch}"


Place: TypeAlias = tuple[int, int]
"""A row and a cell in it, counted from 0."""


@dataclass(frozen=True)
class ScheduleTable:
    """The content of such a file: `rows[r]` are the cells of rank r, None where it is idle."""

    rows: tuple[tuple[Cell | None, ...], ...]
    digest: str = ""
    """The SHA-256 of the file, which must be the same on all ranks."""

    def cells(self) -> Iterator[tuple[Place, Cell]]:
        """Yield every compute with its place, row by row."""
        for r, row in enumerate(self.rows):
            yield from (((r, c), cell) for c, cell in enumerate(row) if cell is not None)

    @cached_property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """The stages on each rank, in order."""
        return tuple(tuple(sorted({cell.stage for cell in row if cell is not None})) for row in self.rows)

    @property
    def num_chunks(self) -> int:
        """The number of stages on each rank."""
        return len(self.stages[0])

    @property
    def num_stages(self) -> int:
        """The number of stages of the whole model."""
        return sum(map(len, self.stages))

    @cached_property
    def num_microbatches(self) -> int:
        """The number of microbatches of a step."""
        return 1 + max(cell.microbatch for _, cell in self.cells())

    @classmethod
    def aligned(cls, rows: Sequence[Sequence[Cell]]) -> "ScheduleTable":
        """Return the table of these computes in which each waits for what it needs, if all take equally long."""
        steps = steps_of(rows)[0]
        lengths = [1 + max(steps[cell] for cell in row) for row in rows]
        cells = [{steps[cell]: cell for cell in row} for row in rows]
        return cls(tuple(tuple(row.get(c) for c in range(n)) for row, n in zip(cells, lengths, strict=True)))

    def csv(self) -> str:
        """Return the table as CSV."""
        return "".join(",".join(str(cell or "") for cell in row) + "\n" for row in self.rows)

    def grid(self, *marked: Place) -> str:
        """Return the table as text, around the first of the marked places: `>1F0<`."""
        return grid([[str(cell or "") for cell in row] for row in self.rows], marked)


class ScheduleFile(str):
    """The path of a schedule, with the `table` that was read from it when the config was read.

    It compares and is written as the path is.
    """

    table: ScheduleTable

    @classmethod
    def read(cls, path: str) -> "ScheduleFile":
        """Return the path with its content, of which every compute is there once. Raises ConfigError."""
        content = read_bytes(Path(path), with_key(ConfigError, KEY), at_most=MOST_BYTES, links=True)
        found = cls(path)
        found.table = table_of(content, path)
        return found


class TableError(ColonnadeError):
    """The error of a table that is no schedule: what is wrong, at which place, with the grid."""

    def __init__(self, wrong: str, text: str, *places: Place) -> None:
        row, cell = places[0]
        super().__init__(f"row {row + 1} (rank {row}), cell {cell + 1}: {wrong}\n{text}")


def table_of(content: bytes, name: str) -> ScheduleTable:
    """Return the schedule in a file's content. Raises ConfigError, with the place, for what is no schedule."""
    try:
        texts = list(csv.reader(content.decode("utf-8-sig").splitlines()))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{KEY}: {name} is no CSV: {error}. Try '1f1b'.") from error
    while texts and not any(texts[-1]):
        texts.pop()
    if not texts:
        raise ConfigError(f"{KEY}: {name} has no action. A row is a rank, a cell is 0F0 or 1B2. Try '1f1b'.")
    try:
        rows = tuple(tuple(_cell(texts, (r, c)) for c in range(len(row))) for r, row in enumerate(texts))
        table = ScheduleTable(rows, hashlib.sha256(content).hexdigest())
        _check_ranks(table)
        _check_once(table)
        _check_complete(table)
        _check_order(table)
    except TableError as error:
        raise ConfigError(f"{KEY}: {name}, {error}") from error
    return table


def _cell(texts: Sequence[Sequence[str]], place: Place) -> Cell | None:
    """Return the compute at a place of the file, None where it is empty. Raises TableError."""
    text = texts[place[0]][place[1]].strip()
    if not text:
        return None
    if found := CELL.fullmatch(text):
        return Cell(int(found[1]), found[2], int(found[3]))
    for name, reason in NOT_RUN.items():
        if re.fullmatch(rf"(\d+{name}\d*|\(.*\){name})", text):
            raise TableError(f"{shown(text)} is not run from a file: {reason}.", grid(texts, [place]), place)
    what = "is no action: write stage, op (F, B, I or W) and microbatch, such as 0F0"
    raise TableError(f"{shown(text)} {what}.", grid(texts, [place]), place)


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
        f"{cell} waits for {' and '.join(str(need) for need in _needs(cell, every) if need not in done)}"
        for cell in stuck
    ]
    rest = f" and {len(waits) - SHOWN_ROWS} more ranks wait" if len(waits) > SHOWN_ROWS else ""
    wrong = f"the schedule waits forever: {'; '.join(waits[:SHOWN_ROWS])}{rest}."
    raise TableError(wrong, table.grid(*places), *places)


def steps_of(queues: Sequence[Sequence[Cell]]) -> tuple[dict[Cell, int], list[int]]:
    """Return in which step each compute runs, were all equally long, and how many of each rank run at all.

    A rank runs its computes in order, each as soon as what it needs has run.
    """
    every = {cell for queue in queues for cell in queue}
    steps: dict[Cell, int] = {}
    positions, clocks = [0] * len(queues), [0] * len(queues)
    progressed = True
    while progressed:
        progressed = False
        for r, queue in enumerate(queues):
            while positions[r] < len(queue):
                cell = queue[positions[r]]
                needs = _needs(cell, every)
                if any(need not in steps for need in needs):
                    break
                steps[cell] = max([clocks[r], *(steps[need] + 1 for need in needs)])
                clocks[r], positions[r], progressed = steps[cell] + 1, positions[r] + 1, True
    return steps, positions


def _needs(cell: Cell, every: Set[Cell]) -> list[Cell]:
    """Return the computes, of these, whose results a compute uses."""
    stage, op, k = cell
    if op == "W":
        return [Cell(stage, "I", k)]
    if op == "F":
        return [Cell(stage - 1, "F", k)] if stage else []
    after = [need for need in (Cell(stage + 1, "B", k), Cell(stage + 1, "I", k)) if need in every]
    return [Cell(stage, "F", k), *after]


def grid(texts: Sequence[Sequence[str]], marked: Iterable[Place]) -> str:
    """Return the cells around the first marked place in columns, a row for each rank, with the places marked."""
    places = list(marked)
    row, column = places[0]
    first_row, first_cell = max(0, row - SHOWN_ROWS), max(0, column - SHOWN_CELLS)
    rows = range(first_row, min(len(texts), row + SHOWN_ROWS + 1))
    longest = max(len(texts[r]) for r in rows)
    cells = range(first_cell, min(longest, column + SHOWN_CELLS + 1))

    def text(r: int, c: int) -> str:
        found = texts[r][c].strip()[:LONGEST_CELL] if c < len(texts[r]) else ""
        found = "".join(character if character.isprintable() else "?" for character in found)
        return f">{found or '..'}<" if (r, c) in places else f" {found or ('..' if c < longest else '')} "

    widths = {c: max(len(text(r, c)) for r in rows) for c in cells}
    before, after = "… " if first_cell else "", " …" if cells.stop < longest else ""
    name = len(str(rows.stop - 1))
    return "\n".join(
        f"  rank {r:>{name}}  {before}{' '.join(text(r, c).ljust(widths[c]) for c in cells)}{after}".rstrip()
        for r in rows
    )

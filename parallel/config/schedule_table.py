"""A pipeline's schedule as a table of computes: a row for each rank, each of them in the order of time."""

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

SHOWN_ROWS, SHOWN_CELLS = 4, 5  # of the grid in a message, at most, on each side of the marked place
GRID_WIDTH = 66  # columns of a screen of 80 that the names of ranks leave for the cells
LONGEST_CELL = 16  # characters in that grid


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


def steps_of(queues: Sequence[Sequence[Cell]]) -> tuple[dict[Cell, int], list[int]]:
    """Return in which step each compute runs, were all equally long, and how many of each rank run at all.

    A rank runs its computes in order, each as soon as what it needs has run. Each compute is looked at once, and once
    more for each other one that it has to wait for.
    """
    every = {cell for queue in queues for cell in queue}
    steps: dict[Cell, int] = {}
    positions, free = [0] * len(queues), [0] * len(queues)
    waiting: dict[Cell, list[int]] = {}  # ranks, by what they need next
    ready = list(range(len(queues)))
    while ready:
        r = ready.pop()
        while positions[r] < len(queues[r]):
            cell = queues[r][positions[r]]
            needs = needs_of(cell, every)
            missing = next((need for need in needs if need not in steps), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(r)
                break
            steps[cell] = max([free[r], *(steps[need] + 1 for need in needs)])
            free[r], positions[r] = steps[cell] + 1, positions[r] + 1
            ready += waiting.pop(cell, [])
    return steps, positions


def needs_of(cell: Cell, every: Set[Cell]) -> list[Cell]:
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
    rows = range(max(0, row - SHOWN_ROWS), min(len(texts), row + SHOWN_ROWS + 1))
    longest = max(len(texts[r]) for r in rows)
    near = [
        texts[r][c].strip()
        for r in rows
        for c in range(max(0, column - SHOWN_CELLS), column + SHOWN_CELLS + 1)
        if c < len(texts[r])
    ]
    widest = max(map(len, near), default=0)
    shown = min(SHOWN_CELLS, max(1, (GRID_WIDTH // (min(widest, LONGEST_CELL) + 3) - 1) // 2))
    first_cell = max(0, column - shown)
    cells = range(first_cell, min(longest, column + shown + 1))

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

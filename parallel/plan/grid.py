"""The computes of a plan as a grid, a row for each rank, and the grid of what is refused, with the places marked."""

from collections.abc import Iterator, Mapping, Sequence

from parallel.plan.plan import Place, Plan, PlanError
from parallel.plan.timeline import starts_of

BEFORE, AFTER = 6, 3  # columns that are shown on both sides of the first mark, at most
MOST_COLUMNS = 13
GRID_WIDTH = 66  # characters of a screen of 80 that the names of ranks leave for the cells
AROUND = 5  # ranks that are shown on both sides of it
MOST_LINES = 12  # about ranks that wait


def columns_of(plan: Plan) -> list[dict[int, int]]:
    """Return, for each rank, in which column each of its computes is, by its position.

    A column is the time of one compute, were all equally long. Computes that never start follow those before them.
    """
    found = []
    for actions, starts in zip(plan.ranks, starts_of(plan, lambda compute: 1), strict=True):
        columns: dict[int, int] = {}
        column = 0
        for position, action in enumerate(actions):
            if action.op.is_transfer:
                continue
            if position < len(starts):
                column = int(starts[position])
            columns[position] = column
            column += 1
        found.append(columns)
    return found


def refusal(message: str, plan: Plan, *places: Place, waits: bool = False) -> PlanError:
    """Return the error with this message, and below it the grid of the plan's computes with these places marked.

    Where a place is a transfer, the compute after it is marked. With `waits`, the plan stops at these places: no
    computes after them are shown.
    """
    marked = dict(reversed(places))
    rows, marks = [], {}
    for rank, (actions, columns) in enumerate(zip(plan.ranks, columns_of(plan), strict=True)):
        end = max(columns.values(), default=-1) + 1
        if rank in marked:
            marks[rank] = next((column for position, column in columns.items() if position >= marked[rank]), end)
        last = marks[rank] if waits and rank in marked else end
        rows.append({column: str(actions[position]) for position, column in columns.items() if column <= last})
    first = places[0][0]
    return PlanError(message, places, grid(rows, [(first, marks[first]), *marks.items()]))


def shortened(lines: list[str]) -> list[str]:
    """Return the first of these lines, one for each rank, and how many are left out."""
    left_out = len(lines) - MOST_LINES
    return lines if left_out <= 0 else [*lines[:MOST_LINES], f"  and {left_out} other ranks"]


def grid(rows: Sequence[Mapping[int, str]], marks: Sequence[tuple[int, int]]) -> Iterator[str]:
    """Yield a line for each rank, with its cells by column; each mark is a rank and a column: `>F0.1<`.

    A large grid is cut around the first mark.
    """
    rank, column = marks[0]
    shown = range(max(0, rank - AROUND), min(len(rows), rank + AROUND + 1))
    near = range(max(0, column - BEFORE), column + MOST_COLUMNS)
    width = max(2, *(len(rows[r].get(c, "")) for r in shown for c in near))
    num_columns = min(MOST_COLUMNS, GRID_WIDTH // (width + 2))
    first = max(0, column - min(BEFORE, num_columns * 2 // 3))
    longest = 1 + max([*(c for row in rows for c in row), *(c for _, c in marks)])
    end = min(longest, first + num_columns, max([column + 1 + AFTER, *(c + 1 for _, c in marks)]))
    if shown[0] > 0:
        yield "…"
    for r in shown:
        cells = [rows[r].get(c, "." * width).ljust(width) for c in range(first, end)]
        texts = [
            f">{text.rstrip()}<".ljust(width + 2) if (r, c) in marks else f" {text} "
            for c, text in enumerate(cells, first)
        ]
        line = f"rank {r:>{len(str(shown[-1]))}} {'…' if first else ' '}{''.join(texts)}"
        yield f"{line}…" if end < longest else line.rstrip(" .")
    if shown[-1] + 1 < len(rows):
        yield "…"

"""The tables of the documents in which each row says what is supported or refused: a test runs every row.

A test module has a dict of checks by the first cell of a row, and a test that is parametrized by `rows(page, heading)`;
it compares the two, so that no row is without a check.
"""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """A row of a table: what the user brings, and what is done with it. Marks of Markdown are kept."""

    what: str
    answer: str

    def __str__(self) -> str:
        return self.what


def rows(page: str, heading: str) -> list[Row]:
    """Return the rows of the first table with two columns under this heading of a page, without the table's head.

    Raises LookupError where the page has no such heading, or no table under it.
    """
    section = _section((ROOT / page).read_text(encoding="utf-8").splitlines(), heading)
    cells = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in section if line[:1] == "|"]
    if len(cells) < 3:
        raise LookupError(f"{page}: there is no table under {heading!r}")
    return [Row(what, answer) for what, answer in cells[2:]]


def _section(lines: list[str], heading: str) -> list[str]:
    """Return the lines from this heading to the next one."""
    starts = [i for i, line in enumerate(lines) if line.startswith("#") and line.lstrip("# ") == heading]
    if not starts:
        raise LookupError(f"there is no heading {heading!r}")
    first = starts[0] + 1
    end = next((i for i in range(first, len(lines)) if lines[i].startswith("#")), len(lines))
    return lines[first:end]

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
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from parallel.config.schedule_checks import TableError, check_table
from parallel.config.schedule_table import Cell, Place, ScheduleTable, grid
from parallel.errors import ConfigError, shown
from parallel.regular_file import read_bytes, with_key

KEY = "parallel.pipeline.schedule"
MOST_BYTES, MOST_RANKS = 1 << 22, 1 << 12  # of a file: a step of 64 ranks and 3,000 microbatches
CELL = re.compile(r"([0-9]{1,7})([FBIW])([0-9]{1,7})")

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
    if len(texts) > MOST_RANKS:
        raise ConfigError(f"{KEY}: {name} has {len(texts):,} rows, and a pipeline at most {MOST_RANKS:,} ranks.")
    try:
        rows = tuple(tuple(_cell(texts, (r, c)) for c in range(len(row))) for r, row in enumerate(texts))
        table = ScheduleTable(rows, hashlib.sha256(content).hexdigest())
        check_table(table)
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

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

from parallel.config.schedule_placement import check_placement
from parallel.errors import ConfigError, shown
from parallel.plan.computes import validate_computes
from parallel.plan.grid import grid
from parallel.plan.plan import Action, Op, Plan, PlanError
from parallel.regular_file import read_bytes, with_key

KEY = "parallel.pipeline.schedule"
MOST_BYTES, MOST_RANKS = 1 << 22, 1 << 12  # of a file: a step of 64 ranks and 3,000 microbatches
LONGEST_CELL = 16  # characters of a cell in a message
CELL = re.compile(r"([0-9]{1,7})([FBIW])([0-9]{1,7})")
NAME = re.compile(r"\b([FBIW])(\d+)\.(\d+)\b")  # of the same compute in a plan

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
    """The path of a schedule, with what was read from it when the config was read.

    It compares and is written as the path is.
    """

    plan: Plan
    """The computes of each rank, which are proved."""

    stages: tuple[tuple[int, ...], ...]
    """The stages on each rank, in order."""

    digest: str
    """The SHA-256 of the file, which must be the same on all ranks."""

    @classmethod
    def read(cls, path: str) -> "ScheduleFile":
        """Return the path with its content, of which every compute is there once. Raises ConfigError."""
        content = read_bytes(Path(path), with_key(ConfigError, KEY), at_most=MOST_BYTES, links=True)
        found = cls(path)
        found.plan = plan_of_csv(content, path)
        found.stages = found.plan.stages()
        found.digest = hashlib.sha256(content).hexdigest()
        return found


def plan_of_csv(content: bytes, name: str) -> Plan:
    """Return the plan of computes in a file's content. Raises ConfigError, with the place, for what is no schedule."""
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
        return _plan_of(texts)
    except _CellError as error:
        (row, cell), *_ = error.cells
        cells = [{c: text for c, each in enumerate(row) if (text := _shown_cell(each))} for row in texts]
        where = f"row {row + 1} (rank {row}), cell {cell + 1}"
        raise ConfigError("\n".join([f"{KEY}: {name}, {where}: {error}", *grid(cells, error.cells)])) from error


class _CellError(ValueError):
    """The error of a table that is no schedule, with the rows and columns of the cells that are wrong."""

    def __init__(self, message: str, *cells: tuple[int, int]) -> None:
        super().__init__(message)
        self.cells = cells


def _plan_of(texts: Sequence[Sequence[str]]) -> Plan:
    """Return the plan of the computes in a table, which are proved. Raises _CellError."""
    computes = [
        {c: compute for c in range(len(row)) if (compute := _compute_of(row[c].strip(), (r, c))) is not None}
        for r, row in enumerate(texts)
    ]
    every = [compute for row in computes for compute in row.values()]
    num_stages, num_microbatches = (
        1 + max(numbers, default=-1) for numbers in ((c.stage for c in every), (c.microbatch for c in every))
    )
    plan = Plan(tuple(tuple(row.values()) for row in computes), num_stages, num_microbatches)
    try:
        check_placement(plan)
        validate_computes(plan)
    except PlanError as error:
        columns = [[*row, max(row, default=-1) + 1] for row in computes]
        message = NAME.sub(r"\2\1\3", error.message)
        raise _CellError(message, *((rank, columns[rank][position]) for rank, position in error.places)) from error
    return plan


def _compute_of(text: str, cell: tuple[int, int]) -> Action | None:
    """Return the compute in a cell of the file, None where it is empty. Raises _CellError."""
    if not text:
        return None
    if found := CELL.fullmatch(text):
        return Action(Op(found[2]), int(found[1]), int(found[3]))
    for name, reason in NOT_RUN.items():
        if re.fullmatch(rf"(\d+{name}\d*|\(.*\){name})", text):
            raise _CellError(f"{shown(text)} is not run from a file: {reason}.", cell)
    what = "is no action: write stage, op (F, B, I or W) and microbatch, such as 0F0"
    raise _CellError(f"{shown(text)} {what}.", cell)


def _shown_cell(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text.strip()[:LONGEST_CELL])

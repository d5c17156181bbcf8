"""The computes of a plan as CSV, as torch.distributed.pipelining writes and reads them: a row for each rank."""

from parallel.plan.grid import columns_of
from parallel.plan.plan import Action, Plan


def cell_of(compute: Action) -> str:
    """Return the cell of a compute: its stage, op and microbatch."""
    return f"{compute.stage}{compute.op.value}{compute.microbatch}"


def csv_of(plan: Plan) -> str:
    """Return the computes of a plan; empty cells say where a rank waits, were all equally long."""
    lines = []
    for actions, columns in zip(plan.ranks, columns_of(plan), strict=True):
        cells = {column: cell_of(actions[position]) for position, column in columns.items()}
        lines.append(",".join(cells.get(column, "") for column in range(max(cells) + 1)) + "\n")
    return "".join(lines)

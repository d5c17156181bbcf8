"""A plan as the CSV of computes that torch.distributed.pipelining reads, and back."""

from parallel.config.schedule_file import Cell, ScheduleTable
from parallel.pipeline.plan import Action, Op, Plan


def csv_of(plan: Plan) -> str:
    """Return the computes of a plan, a row for each rank; empty cells say where a rank waits, were all equally long."""
    rows = [
        [Cell(a.stage, a.op.value, a.microbatch) for a in actions if not a.op.is_transfer] for actions in plan.ranks
    ]
    return ScheduleTable.aligned(rows).csv()


def plan_of_table(table: ScheduleTable) -> Plan:
    """Return the plan of the computes that a table has."""
    ranks = tuple(tuple(Action(Op(c.op), c.stage, c.microbatch) for c in row if c is not None) for row in table.rows)
    return Plan(ranks, table.num_stages, table.num_microbatches)

"""A plan as the CSV of computes that torch.distributed.pipelining reads, and back."""

from parallel.config.schedule_table import Cell, ScheduleTable
from parallel.errors import ConfigError
from parallel.pipeline.plan import Action, Op, Plan


def csv_of(plan: Plan) -> str:
    """Return the computes of a plan, a row for each rank; empty cells say where a rank waits, were all equally long."""
    rows = [
        [Cell(a.stage, a.op.value, a.microbatch) for a in actions if not a.op.is_transfer] for actions in plan.ranks
    ]
    return ScheduleTable.aligned(rows).csv()


def plan_of_table(table: ScheduleTable, num_microbatches: int) -> Plan:
    """Return the plan of the computes that a table has. Raises ConfigError for another number of microbatches."""
    if num_microbatches != table.num_microbatches:
        raise ConfigError(
            f"parallel.pipeline.schedule: the file has {table.num_microbatches} microbatches, and a step has"
            f" {num_microbatches}. Give each replica {table.num_microbatches} × train.micro_batch_size samples."
        )
    ranks = tuple(tuple(Action(Op(c.op), c.stage, c.microbatch) for c in row if c is not None) for row in table.rows)
    return Plan(ranks, table.num_stages, num_microbatches)

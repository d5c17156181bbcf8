"""A schedule in a file: torch's pipelining writes and reads the same files, and what is wrong in one is named."""

import copy
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import schedules as torchs

from parallel.config import Config, PipelineConfig, parse
from parallel.config.schedule_file import MOST_BYTES, ScheduleFile, plan_of_csv
from parallel.engine.context import Place, make_context
from parallel.engine.facts import facts_of
from parallel.errors import ConfigError
from parallel.pipeline.schedule import SCHEDULES, plan_of
from parallel.pipeline.transfers import with_transfers
from parallel.plan.compute_csv import cell_of, csv_of
from parallel.plan.plan import Action, Plan, PlanError
from parallel.plan.validate import validate
from tests.harness import run
from tests.test_loop import TINY
from training.config import read_config
from training.preflight import prepare
from training.run import make_engine, make_loader

MULTI = torchs.PipelineScheduleMulti


class Stage:
    """A stage of torch's pipelining, as far as the constructor of a schedule asks for it."""

    def __init__(self, index: int, num_stages: int, num_ranks: int) -> None:
        self.stage_index, self.num_stages, self.group_size, self.group_rank = index, num_stages, num_ranks, 0
        self.is_first, self.is_last, self.has_backward = index == 0, index == num_stages - 1, True
        self.stage_index_to_group_rank: dict[int, int] = {}
        self.device, self.submod = torch.device("cpu"), None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


def schedule_of_torch(name: str, p: int, m: int, chunks: int = 2) -> Any:
    """Return one of torch's schedules, as rank 0 of the pipe makes it."""
    is_v = "V" in name
    stages = [Stage(stage, p * chunks, p) for stage in ([0, 2 * p - 1] if is_v else range(0, p * chunks, p))]
    return getattr(torchs, name)(stages, m, loss_fn=lambda output, target: output)


def computes(plan: Plan) -> list[list[Action]]:
    return [[action for action in actions if not action.op.is_transfer] for actions in plan.ranks]


# -- torch's format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (3, 6)])
@pytest.mark.parametrize(
    "name", ["ScheduleInterleaved1F1B", "ScheduleInterleavedZeroBubble", "ScheduleZBVZeroBubble", "ScheduleLoopedBFS"]
)
def test_every_action_of_torchs_schedules_is_read_at_its_place(name: str, p: int, m: int, tmp_path: Path) -> None:
    schedule, file = schedule_of_torch(name, p, m), tmp_path / "plan.csv"
    MULTI._dump_csv(schedule, file)
    read = ScheduleFile.read(str(file))
    assert read.plan.num_microbatches == m
    for rank, row in enumerate(read.plan.ranks):
        assert [(a.stage, a.op.value, a.microbatch) for a in row] == [
            (a.stage_index, a.computation_type.value, a.microbatch_index)
            for a in schedule.pipeline_order[rank]
            if a is not None
        ]
    assert read.stages == tuple(
        tuple(s for s, holder in sorted(schedule.stage_index_to_group_rank.items()) if holder == r) for r in range(p)
    )
    validate(with_transfers(read.plan))


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_written_is_read_back_and_read_by_torch(name: str, recomputes: bool, tmp_path: Path) -> None:
    """torch lowers it to a plan with communication, and simulates that to its end."""
    p, m = 4, 8
    pipeline = PipelineConfig(size=p, schedule=name)
    plan, file = plan_of(pipeline, m, recomputes=recomputes), tmp_path / "plan.csv"
    file.write_text(csv_of(plan))
    read = ScheduleFile.read(str(file))
    assert computes(read.plan) == computes(plan)
    assert read.stages == tuple(tuple(sorted(stages)) for stages in pipeline.stages)
    chunks = pipeline.num_chunks
    reader = schedule_of_torch("ScheduleInterleaved1F1B", p, m, chunks)
    MULTI._load_csv(reader, str(file))
    for rank, row in enumerate(computes(plan)):
        assert [str(action) for action in reader.pipeline_order[rank] if action] == [cell_of(action) for action in row]
    lowered = torchs._add_send_recv(
        {rank: [a for a in row if a is not None] for rank, row in reader.pipeline_order.items()},
        stage_to_rank=reader.stage_index_to_group_rank.__getitem__,
        num_stages=p * chunks,
    )
    torchs._simulate_comms_compute(lowered, reader.stage_index_to_group_rank.__getitem__, p * chunks)


def test_in_the_grid_of_a_file_a_rank_is_idle_until_what_it_waits_for_has_run() -> None:
    plan = plan_of(PipelineConfig(size=3, schedule="gpipe"), 2, recomputes=True)
    assert csv_of(plan).splitlines() == ["0F0,0F1,,,,,0B0,0B1", ",1F0,1F1,,,1B0,1B1", ",,2F0,2F1,2B0,2B1"]


# -- refusing ----------------------------------------------------------------------------------------------------------


def refusal_of(text: str) -> str:
    """Return why this file is refused, and nothing where it is read."""
    try:
        plan_of_csv(text.encode(), "plan.csv")
    except ConfigError as error:
        return str(error)
    return ""


GOOD = "0F0,0F1,,0B0,0B1\n,1F0,1B0,1F1,1B1\n"


@pytest.mark.parametrize(
    ("text", "place", "words", "marked"),
    [
        ("0F0,0F1,,0B0\n,1F0,1B0,1F1,1B1", "row 1 (rank 0), cell 5", "pass stage 0 once: 0B1 runs 0 times", ">...<"),
        ("0F0,0B0,0F0", "row 1 (rank 0), cell 3", "pass stage 0 once: 0F0 runs 2 times", " 0B0 >0F0<"),
        ("0F0,0I0", "row 1 (rank 0), cell 3", "after an I, 0W0 must run once, and after a B never", ">...<"),
        ("0F0,0W0", "row 1 (rank 0), cell 3", "pass stage 0 once: 0B0 runs 0 times", ">...<"),
        ("0F0,0I0,0W0,0B0", "row 1 (rank 0), cell 4", "pass stage 0 once: 0B0 runs 2 times", ">0B0<"),
        ("0F0,0W0,0I0", "row 1 (rank 0), cell 2", "rank 0 waits for 0B0, which 0W0 needs", ">0W0<"),
        (
            "0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0",
            "row 1 (rank 0), cell 2",
            "waits forever:\n  rank 0 waits for 1B0, which 0B0 needs\n  rank 1 waits for 0F1, which 1F1 needs",
            "rank 1  >1F1<",
        ),
        ("0F0,0B0\n0F1,0B1", "row 1 (rank 0), cell 1", "rank 0 has 0F0, but stage 0 is on rank 1", ">0F0<"),
        ("0F0,0B0\n2F0,2B0", "row 2 (rank 1), cell 1", "a stage 2 and no stage 1", ">2F0<"),
        ("0F0,1F0,1B0,0B0\n2F0,2B0", "row 2 (rank 1), cell 1", "holds 1 of the stages, and rank 0 2", ">2F0<"),
        (
            "0F0,0B0\n2F0,2B0\n1F0,1B0\n3F0,3B0",
            "row 3 (rank 2), cell 1",
            "stage 1 is on rank 2, and stage 0 on rank 0. Consecutive stages are on one rank or on neighbours",
            ">1F0<",
        ),
        ("0F0,0B0\n\n1F0,1B0", "row 2 (rank 1), cell 1", "the rank has no action", ">...<"),
        (" ,", "row 1 (rank 0), cell 1", "the rank has no action", ">..<"),
        ("0F1,0B1", "row 1 (rank 0), cell 1", "microbatch 0 must pass stage 0 once: 0F0 runs 0 times", ">0F1<"),
        ("0F0,x", "row 1 (rank 0), cell 2", "'x' is no action: write stage, op (F, B, I or W) and", ">x<"),
        ("0F0,0F٣", "row 1 (rank 0), cell 2", "is no action", ">0F٣<"),  # a digit, but not one that torch writes
        ("0F0,0SEND_F0", "row 1 (rank 0), cell 2", "'0SEND_F0' is not run from a file: transfers", ">0SEND_F0<"),
        ("0UNSHARD,0F0,0B0", "row 1 (rank 0), cell 1", "not run from a file: zero.stage decides", ">0UNSHARD<"),
        ("0F0,0B0,0REDUCE_GRAD", "row 1 (rank 0), cell 3", "'0REDUCE_GRAD' is not run", ">0REDUCE_GRAD<"),
        ("0F0,(0F1;0B0)OVERLAP_F_B", "row 1 (rank 0), cell 2", "write each into a cell of its own", ">(0F1;0B0)O"),
    ],
)
def test_what_is_no_schedule_is_refused_with_its_place_marked(text: str, place: str, words: str, marked: str) -> None:
    refusal = refusal_of(text)
    assert refusal.startswith(f"parallel.pipeline.schedule: plan.csv, {place}: ")
    assert words in refusal
    assert any(marked in line for line in refusal.splitlines() if line.startswith("rank "))


@pytest.mark.parametrize(
    "content", [b"", b"\n\n", b",,\n", b"\xff\xfe0F0", b"0F0,\0", b'"' + b"0" * 200_000, b"0F0\n" * 4097]
)
def test_what_is_no_table_is_refused(content: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^parallel\.pipeline\.schedule: plan\.csv"):
        plan_of_csv(content, "plan.csv")


def test_a_wide_grid_is_shown_around_the_place() -> None:
    cells = [f"0{op}{k}" for k in range(500) for op in "FB"]
    cells[600] = "0F299"
    with pytest.raises(ConfigError) as refused:
        plan_of_csv(",".join(cells).encode(), "plan.csv")
    message, *grid = str(refused.value).splitlines()
    assert len(message) < 200
    assert max(map(len, grid)) <= 80, "it wrapped, and the columns of the ranks were not above each other"
    assert ">0F299<" in grid[0]


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_schedule_is_read_if_and_only_if_the_proof_of_plans_accepts_it(seed: int) -> None:
    """Two cells of a row change places, or one becomes another. The proof knows nothing of files."""
    rng = random.Random(seed)
    name = rng.choice(list(SCHEDULES))
    plan = SCHEDULES[name](rng.choice([2, 3]), 4, PipelineConfig(schedule=name).num_chunks)
    rows = [list(actions) for actions in plan.ranks]
    row = rng.choice(rows)
    i, j = rng.sample(range(len(row)), 2)
    row[i], row[j] = (row[j], row[i]) if rng.random() < 0.7 else (replace(row[i], microbatch=row[j].microbatch), row[j])
    text = "\n".join(",".join(map(cell_of, row)) for row in rows)
    damaged = replace(plan, ranks=tuple(map(tuple, rows)))
    try:
        validate(with_transfers(damaged))
    except PlanError:
        with pytest.raises(ConfigError):
            plan_of_csv(text.encode(), "plan.csv")
    else:
        assert plan_of_csv(text.encode(), "plan.csv") == damaged


# -- the config --------------------------------------------------------------------------------------------------------


def config_of(file: Path | str, *, world_size: int | None = 2, size: int = 2, **train: int) -> Config:
    raw = {
        "parallel": {"pipeline": {"size": size, "schedule": str(file)}},
        "train": {"global_batch_size": 4, "micro_batch_size": 2} | train,
    }
    return parse(raw, world_size=world_size)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    file = tmp_path / "plan.csv"
    file.write_text(GOOD)
    return file


def test_stages_and_chunks_come_from_the_file(tmp_path: Path) -> None:
    """Here the stages go down the ranks and up again, and not round about."""
    file = tmp_path / "v.csv"
    file.write_text("0F0,,,3F0,3B0,,,0B0\n,1F0,2F0,,,2B0,1B0\n")
    pipeline = config_of(file, global_batch_size=2).parallel.pipeline
    assert (pipeline.num_chunks, pipeline.num_stages) == (2, 4)
    assert pipeline.stages == ((0, 3), (1, 2))
    assert [pipeline.rank_of(stage) for stage in range(4)] == [0, 1, 1, 0]


@pytest.mark.parametrize(("backwards", "is_in_order"), [("0B0,0B1", True), ("0B1,0B0", False), ("0I1,0B0,0W1", False)])
def test_the_first_backward_of_a_file_may_be_that_of_a_later_microbatch(backwards: str, is_in_order: bool) -> None:
    assert plan_of_csv(f"0F0,0F1,{backwards}".encode(), "plan.csv").begins_in_order is is_in_order


def test_a_config_writes_the_path_and_keeps_the_content(good: Path) -> None:
    config = config_of(good)
    assert config.to_dict()["parallel"]["pipeline"]["schedule"] == str(good)
    good.unlink()
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        again, file = copied.parallel.pipeline.file, config.parallel.pipeline.file
        assert file is not None
        assert again is not None
        assert (again.plan, again.stages, again.digest) == (file.plan, file.stages, file.digest)
        assert [cell_of(action) for action in again.plan.ranks[1]] == ["1F0", "1B0", "1F1", "1B1"]


def test_ranks_that_read_other_schedules_under_one_name_differ_in_their_facts(good: Path) -> None:
    first = facts_of(config_of(good), 2)
    good.write_text("0F0,0F1,,0B1,0B0\n,1F0,1F1,1B1,1B0\n")
    second = facts_of(config_of(good), 2)
    assert {key for key in first if first[key] != second[key]} == {"parallel.pipeline.schedule, digest"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(size=3, world_size=3), "parallel.pipeline.size: {} has 2 rows, one for each rank, got 3. Try 2."),
        (
            dict(global_batch_size=12),
            "train.global_batch_size: 12 is 6 microbatches of 2 on one replica, and parallel.pipeline.schedule"
            " {} has 2. Try 4.",
        ),
        (
            dict(world_size=4),
            "train.global_batch_size: 4 is 1 microbatch of 2 on each of 2 replicas, and parallel.pipeline.schedule"
            " {} has 2. Try 8.",
        ),
    ],
)
def test_another_number_of_ranks_or_microbatches_is_refused_with_what_works(
    options: dict[str, int], message: str, good: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of(good, **options)
    assert message.format(good) in str(refused.value)


def test_a_file_is_read_whose_name_ends_in_capitals(good: Path) -> None:
    """plan.CSV was refused in an earlier version, as the name of no schedule."""
    named = good.rename(good.with_suffix(".CSV"))
    assert config_of(named).parallel.pipeline.stages == ((0,), (1,))


def test_a_file_that_cannot_be_read_is_refused_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    with (tmp_path / "large.csv").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    for name, words in (
        ("none.csv", "does not exist"),
        ("none.CSV", "does not exist"),
        ("none", "needs one of 'gpipe', '1f1b', 'interleaved', 'zero_bubble', 'zero_bubble_v', or a .csv file"),
        ("folder.csv", "is a folder, and not a regular file"),
        ("pipe.csv", "is a pipe, and not a regular file"),
        ("large.csv", "more than the 4.00 MiB that it may have"),
    ):
        with pytest.raises(ConfigError, match=words) as refused:
            config_of(tmp_path / name)
        assert str(refused.value).startswith("parallel.pipeline.schedule: ")


# -- training ----------------------------------------------------------------------------------------------------------


def losses(rank: int, world_size: int, schedules: list[str], folder: Path) -> list[list[float]]:
    """Return, for each schedule, loss and norm of a step in fp64, and then the loss of the validation samples."""
    found = []
    for schedule in schedules:
        layout = [f"parallel.pipeline.size={world_size}", f"parallel.pipeline.schedule={schedule}"]
        sizes = ["model.num_hidden_layers=4", "train.global_batch_size=16", "train.precision=fp64", "train.device=cpu"]
        config = read_config(None, [*TINY, *sizes, *layout, f"output.dir={folder}"], world_size)
        job = prepare(config, Place(rank, world_size, rank, world_size))
        engine = make_engine(make_context(config, job.place), job)
        loader = make_loader(engine, job)
        batch = loader.training(0)
        if config.parallel.pipeline.file is not None:
            with pytest.raises(ConfigError, match="the file has 4 microbatches, and a step has 2"):
                engine.train_step({name: values[:8] for name, values in batch.items()})
        result = engine.train_step(batch)
        found.append([result.loss, result.grad_norm or 0.0, engine.evaluate(loader.validation())])
    return found


def test_a_model_trains_by_schedules_of_files_as_by_1f1b(tmp_path: Path) -> None:
    """ZB-V of torch: two stages a rank, W apart from I; and one whose backwards begin with the last microbatch. Sums
    are in another order, in fp64.
    """
    zbv, last_first = tmp_path / "zbv.csv", tmp_path / "last_first.csv"
    MULTI._dump_csv(schedule_of_torch("ScheduleZBVZeroBubble", 2, 4), zbv)
    last_first.write_text("0F0,0F1,0F2,0F3,,0B3,0B2,0B1,0B0\n1F0,1F1,1F2,1F3,1B3,1B2,1B1,1B0\n")
    for first, second, expected in run(losses, 2, [str(zbv), str(last_first), "1f1b"], tmp_path / "run"):
        assert first == pytest.approx(expected, rel=1e-12)
        assert second == pytest.approx(expected, rel=1e-12)

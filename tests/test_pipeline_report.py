"""`--check` says of a pipeline which layers a rank has, its bubble, and the memory of the microbatches in flight."""

import io
import re
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

import launch
from models.build import layers_of_stages
from models.shapes import resolve
from parallel.config import PipelineConfig, parse
from parallel.config.parallel import STAGES_OF_RANK
from parallel.pipeline.plan import Action, Op
from parallel.pipeline.schedule import SCHEDULES
from parallel.pipeline.timeline import Costs, simulate
from tests.accounts import value
from tests.tables import ROOT
from training.pipeline_report import print_pipeline
from training.preview import Preview, preview_of

SCHEDULE_NAMES = sorted(SCHEDULES)
SPLITS = {name: 2 if 2 in STAGES_OF_RANK[name] else 1 for name in SCHEDULE_NAMES}


def preview(schedule: str, size: int = 2, num_microbatches: int = 8, **sections: Any) -> Preview:
    """Return the preview of a small OPT with 8 blocks and this pipeline."""
    raw: dict[str, dict[str, Any]] = dict(
        model=dict(name="opt-tiny", num_hidden_layers=8),
        parallel=dict(pipeline=dict(size=size, schedule=schedule)),
        train=dict(micro_batch_size=2, global_batch_size=2 * num_microbatches, device="cpu"),
    )
    for section, keys in sections.items():
        raw[section] = {**raw.get(section, {}), **keys}
    return preview_of(parse(raw, world_size=size, resolve=resolve), size)


def report(found: Preview, width: int = 120) -> str:
    """Return what is printed of a pipeline."""
    console = Console(width=width, file=io.StringIO())
    with console.capture() as printed:
        print_pipeline(console, found)
    return printed.get()


def check(*sets: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what `--check` prints of two ranks."""
    arguments = ["--check", "--world", "2", "--set", "parallel.pipeline=2", "model.num_hidden_layers=8", *sets]
    assert launch.main(launch.read_arguments(arguments)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("schedule", "rows"),
    [
        ("1f1b", ["embed, layers 0–3", "layers 4–7, head"]),
        ("zero_bubble", ["embed, layers 0–3", "layers 4–7, head"]),
        ("interleaved", ["embed, layers 0–1, 4–5", "layers 2–3, 6–7, head"]),
        ("zero_bubble_v", ["embed, layers 0–1, 6–7, head", "layers 2–5"]),
    ],
)
def test_a_row_has_the_layers_of_all_stages_of_a_rank(
    schedule: str, rows: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = check(f"parallel.pipeline.schedule={schedule}", capsys=capsys)
    for place, layers in enumerate(rows):
        assert re.search(rf"pipe {place} +│ {layers} +│", shown)
    assert re.search(rf"one step of the {schedule} schedule.*rank 0 .*rank 1 .*bubble", shown, re.DOTALL)


def test_layers_are_given_to_stages_in_the_order_of_the_model() -> None:
    """The second rank has the stages in the middle of a V; in a loop it has the second and the last."""
    for schedule, held in (
        ("zero_bubble_v", [{0: 1, 3: 4}, {1: 2, 2: 1}]),
        ("interleaved", [{0: 1, 2: 1}, {1: 2, 3: 4}]),
    ):
        keys = dict(pipeline=dict(size=2, schedule=schedule, layers=(1, 2, 1, 4)))
        parts = preview(schedule, parallel=keys).parts
        found = [
            {stage: sum(name.startswith("layers") for name in names) for stage, names in part.stages.items()}
            for part in parts
        ]
        assert found == held
        names = {stage: names for part in parts for stage, names in part.stages.items()}
        in_order = [name for stage in sorted(names) for name in names[stage]]
        assert in_order == ["embed", *(f"layers.{i}" for i in range(8)), "head"]


def test_layers_are_divided_by_cost_as_the_chunks_of_the_schedule_need_it() -> None:
    """The head costs as much as three blocks: see `partition`."""
    costs = [0.0, 1, 1, 1, 1, 1, 3]
    four, two = PipelineConfig(4), PipelineConfig(2, "interleaved")
    assert [sum(costs[i] for i in stage) for stage in layers_of_stages(costs, four)] == [1, 2, 2, 3]
    assert [sum(costs[i] for i in stage) for stage in layers_of_stages(costs, two)] == [1, 1, 3, 3]


@pytest.mark.parametrize("size", [1, 2])
def test_a_tied_embedding_is_one_table_where_one_rank_has_both_ends(size: int) -> None:
    table = 260 * 128
    apart, together = (
        sum(part.parameters for part in preview(schedule, size).parts) for schedule in ("interleaved", "zero_bubble_v")
    )
    assert together == preview("1f1b", 1).parameters
    assert apart - together == (table if size > 1 else 0)


def kept_after(actions: Sequence[Action], found: Preview) -> int:
    """Return the bytes that a rank keeps after these actions: of each microbatch of a stage, by what is done of it."""
    done = {(action.op, action.stage, action.microbatch) for action in actions}
    total = 0
    for op, stage, microbatch in done:
        if op is Op.F and not {(Op.B, stage, microbatch), (Op.I, stage, microbatch)} & done:
            total += found.kept_bytes[stage]
        elif op is Op.I and (Op.W, stage, microbatch) not in done:
            total += found.weight_bytes[stage]
    return total


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_the_bytes_in_flight_are_the_most_at_any_time(schedule: str) -> None:
    """Compared with a sum over all microbatches after each action: OPT's block keeps more from I to W than before I."""
    found = preview(schedule, 4)
    timeline = found.timeline()
    rows = [[span.action for span in row] for row in timeline.rows]
    peaks = [max(kept_after(row[: i + 1], found) for i in range(len(row))) for row in rows]
    assert list(found.peak_bytes(timeline)) == peaks
    assert sum(found.kept_bytes) > 8 * found.kept_bytes[1] / 3
    assert found.weight_bytes[1] > 1.3 * found.kept_bytes[1]


def test_a_long_step_of_gpipe_keeps_all_microbatches_also_those_that_are_not_simulated() -> None:
    total = 20_000
    for schedule, held in (("gpipe", total), ("1f1b", 2)):
        found = preview(schedule, 2, total)
        assert found.timeline().num_omitted > 0
        assert found.peak_bytes(found.timeline())[0] == held * found.kept_bytes[0]


def test_a_recomputed_block_is_counted_once_and_inputs_for_each_microbatch() -> None:
    """A block keeps 12 widths a token and its statistics (4 H + 4 H + F + A, 4), or its input alone, 1 width."""
    kept, again = (preview("1f1b", train=dict(activation_checkpointing=how)) for how in ("none", "full"))
    tokens, width = 2 * 256, 128
    block = 4 * tokens * (12 * width + 8 + 4)
    assert kept.peak_bytes(kept.timeline())[0] == 2 * 4 * block
    assert again.peak_bytes(again.timeline())[0] == 2 * 4 * (4 * tokens * width) + block


def test_a_check_says_what_recomputation_loses_where_it_does() -> None:
    line = r"recomputation joins W to its backward: bubble ([\d.]+)% instead of ([\d.]+)%"
    for schedule in ("zero_bubble", "zero_bubble_v"):
        assert "joins" not in report(preview(schedule, 4))
        found = re.search(line, report(preview(schedule, 4, train=dict(activation_checkpointing="full"))))
        assert found is not None
        assert float(found[1]) > float(found[2]) + 2
    assert "joins" not in report(preview("1f1b", 4))


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_the_picture_fits_the_screen_and_from_80_columns_on_each_line(schedule: str, width: int) -> None:
    shown = report(preview(schedule, 4, 12, train=dict(activation_checkpointing="full")), width)
    assert max(map(len, shown.splitlines())) <= max(width, 80)
    rows = re.findall(r"^rank \d .*", shown, re.MULTILINE)
    assert len(rows) == 4
    assert max(map(len, rows)) <= width


# -- the table of docs/config.md ---------------------------------------------------------------------------------------

TABLE = re.compile(r"^\| `(\w+)` \| (1|2|v ≥ 2) \| (.*?) \| (.*?) \| .* \|$", re.MULTILINE)


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
def test_the_documents_table_has_idle_time_and_memory_of_each_schedule(schedule: str) -> None:
    """Simulated with equal stages. The rows are letters of the page: p, m, v, r; and f = i = w, times of a rank."""
    rows = {name: cells for name, *cells in TABLE.findall((ROOT / "docs/config.md").read_text("utf-8"))}
    chunks, idle, in_flight = rows[schedule]
    for p, v in [(2, SPLITS[schedule]), (4, SPLITS[schedule])] + ([(4, 3)] if chunks == "v ≥ 2" else []):
        m = 4 * p
        timeline = simulate(SCHEDULES[schedule](p, m, v), Costs(1 / v, 1 / v, 1 / v))
        letters = dict(p=p, m=m, v=v, f=1, i=1, w=1)
        if idle.startswith("nearly none"):
            assert timeline.bubble_fraction < 0.06
        else:
            assert timeline.makespan - 3 * m == pytest.approx(value(idle, letters))
        wanted = [value(in_flight, letters | {"r": rank}) for rank in range(p)]
        assert [peak / v for peak in timeline.peak_in_flight] == pytest.approx(wanted)


def test_all_schedules_are_in_the_documents_table() -> None:
    text = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert {name for name, *_ in TABLE.findall(text)} == set(SCHEDULES) == set(STAGES_OF_RANK)

"""Pictures of timelines: every action is drawn once where it ran, and the figures are those of the timeline."""

import json
import re
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from colonnade import cli
from parallel.config import PipelineConfig
from parallel.engine.action_times import timed_actions
from parallel.engine.context import Place, make_context
from parallel.engine.phases import Stopwatch
from parallel.errors import ConfigError
from parallel.mesh.clocks import ROUNDS, Barriers, ClockOffset, bounds
from parallel.pipeline.drawing import COLORS, Panel, draw_svg
from parallel.pipeline.schedule import SCHEDULES, plan_of
from parallel.plan.plan import Action, Op
from parallel.plan.timeline import Costs, Span, Timeline, in_flight, simulate
from tests.harness import run
from tests.test_loop import ALONE, TINY
from training.action_files import ActionFile
from training.config import read_config
from training.measured import read_measured
from training.preflight import prepare
from training.preview import preview_of
from training.run import make_engine, make_loader
from training.timelines import bubble_text

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"
WIDTH_OF_DIGIT = 6.2


@dataclass(frozen=True)
class Box:
    """A bar of a picture: its class, and its left, top, width and height."""

    look: str
    left: float
    top: float
    width: float
    height: float


def boxes_of(svg: str) -> dict[float, list[Box]]:
    """Return the boxes of actions in a picture by the height of their rank's name, each row from left to right."""
    rows: dict[float, list[Box]] = defaultdict(list)
    for path in ET.fromstring(svg).iter(f"{SVG}path"):
        look = path.get("class", "")
        if re.fullmatch(r"[FBIW]\d+", look):
            height = float(path.get("stroke-width", ""))
            for left, top, width in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)", path.get("d", "")):
                rows[float(top)].append(Box(look, float(left), float(top), float(width), height))
    names = [y for look, text, _, y in texts_of(svg) if text.startswith("rank ")]
    found = {y: [box for top, row in rows.items() for box in row if y - 16 < top < y + 3] for y in names}
    return {y: sorted(row, key=lambda box: box.left) for y, row in found.items()}


def texts_of(svg: str) -> list[tuple[str, str, float, float]]:
    """Return the class, the text and the place of each text."""
    return [
        (text.get("class", ""), text.text or "", float(text.get("x", "")), float(text.get("y", "")))
        for text in ET.fromstring(svg).iter(f"{SVG}text")
    ]


def timeline_of(name: str, p: int = 4, m: int = 8) -> Timeline:
    pipeline = PipelineConfig(size=p, schedule=name)
    costs = [1 + stage / 10 for stage in range(pipeline.num_stages)]
    return simulate(plan_of(pipeline, m, recomputes=False), Costs(costs, costs, costs))


def computes(row: tuple[Span, ...]) -> list[Span]:
    return [span for span in row if not span.action.op.is_transfer]


# -- the picture -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_is_a_box_where_it_runs_and_no_two_overlap(name: str) -> None:
    timeline = timeline_of(name)
    rows = list(boxes_of(draw_svg(name, [Panel("Planned", timeline)])).values())
    left = min(box.left for row in rows for box in row)
    scale = (max(box.left + box.width for row in rows for box in row) - left) / timeline.end_of_rows
    assert len(rows) == 4
    for row, spans in zip(rows, map(computes, timeline.rows), strict=True):
        assert len(row) == len(spans)
        chunks = sorted({span.action.stage for span in spans})
        for box, span in zip(row, spans, strict=True):
            assert box.look == f"{span.action.op.value}{chunks.index(span.action.stage)}"
            assert box.left == pytest.approx(left + scale * span.start, abs=1)
            assert box.left + box.width == pytest.approx(left + scale * span.end, abs=1)
        for one, other in pairwise(row):
            assert one.left + one.width <= other.left + 0.02  # two decimals of a pixel are written


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_box_has_the_number_of_its_microbatch_inside_where_it_fits(name: str) -> None:
    timeline = timeline_of(name, m=12)
    svg = draw_svg(name, [Panel("Planned", timeline)])
    labels = [(text, x, y) for look, text, x, y in texts_of(svg) if look.startswith("label")]
    rows = boxes_of(svg)
    for row, spans in zip(rows.values(), map(computes, timeline.rows), strict=True):
        for box, span in zip(row, spans, strict=True):
            inside = [
                (text, x)
                for text, x, y in labels
                if box.left <= x <= box.left + box.width and box.top <= y <= box.top + box.height
            ]
            name = str(span.action.microbatch)
            wide = WIDTH_OF_DIGIT * len(name)
            assert [text for text, _ in inside] in ([[name]] if box.width > wide + 4 else [[], [name]])
            for _, x in inside:
                assert box.left <= x - wide / 2
                assert x + wide / 2 <= box.left + box.width + 0.5


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_is_in_flight_peaks_at_the_timelines_number_and_ends_at_none(name: str) -> None:
    timeline = timeline_of(name)
    for row, peak in zip(timeline.rows, timeline.peak_in_flight, strict=True):
        levels = in_flight(row, [1] * 8)
        assert max(count for _, count in levels) == peak
        assert levels[-1][1] == 0
        assert all(one[0] <= other[0] for one, other in pairwise(levels))
    peaks = [text for _, text, _, _ in texts_of(draw_svg(name, [Panel("", timeline)])) if text.startswith("max ")]
    assert peaks == [f"max {peak:g}" for peak in timeline.peak_microbatches], "in the unit of --check and of papers"


def test_a_text_is_text_whatever_it_has_and_the_same_calls_give_the_same_bytes() -> None:
    panel = Panel("<&>\x00\ud800", timeline_of("1f1b"), ("a < b",))
    svg = draw_svg("runs/<x> & y", [panel])
    assert svg == draw_svg("runs/<x> & y", [panel])
    texts = [text for _, text, _, _ in texts_of(svg)]
    assert "runs/<x> & y" in texts
    assert "<&>��" in texts


def test_no_text_leaves_the_paper_and_none_stands_on_another() -> None:
    for name in SCHEDULES:
        svg = draw_svg(name, [Panel("Planned", timeline_of(name, 4, 8), ("figures",))])
        width = float(ET.fromstring(svg).get("width", ""))
        lines = defaultdict(list)
        for look, text, x, y in texts_of(svg):
            long = 7.4 * len(text) if "title" in look or "heading" in look else WIDTH_OF_DIGIT * len(text)
            begin = x - long if "end" in look else x - long / 2 if "label" in look or "middle" in look else x
            lines[y].append((begin, begin + long, text))
        for found in lines.values():
            assert all(begin >= 0 and end <= width for begin, end, _ in found), found
            assert all(one[1] <= other[0] + 0.5 for one, other in pairwise(sorted(found))), found


def test_colours_differ_in_lightness_for_print() -> None:
    def lightness(color: str) -> float:
        linear: list[float] = [(v / 255) ** 2.2 for v in bytes.fromhex(color[1:])]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    found = sorted(lightness(color) for color, _ in COLORS.values())
    assert all((other + 0.05) / (one + 0.05) > 1.4 for one, other in pairwise(found))


@pytest.mark.slow
def test_a_picture_of_64_ranks_and_512_microbatches_has_less_than_4_megabytes() -> None:
    svg = draw_svg("1f1b", [Panel("Planned", timeline_of("1f1b", 64, 512))])
    assert len(svg) < 4e6
    assert sum(map(len, boxes_of(svg).values())) >= 2 * 64 * 512


def test_the_picture_in_the_documents_is_what_its_command_draws(tmp_path: Path) -> None:
    page = (ROOT / "docs/timeline.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"colonnade (timeline --out docs/timeline\.svg (?:.*\\\n)*.*)", page)
    arguments = command.replace("\\\n", " ").replace("docs/", f"{tmp_path}/").split()
    assert cli.main(arguments) == 0
    assert (tmp_path / "timeline.svg").read_bytes() == (ROOT / "docs/timeline.svg").read_bytes()


# -- figures -----------------------------------------------------------------------------------------------------------


def by_hand() -> Timeline:
    """Two ranks: the first computes 4 of its 8 seconds, the second 5 of the 6 between its first and its last action."""
    rows = [
        [(Op.F, 0, 0, 0, 1), (Op.F, 0, 1, 1, 2), (Op.B, 0, 0, 5, 6), (Op.B, 0, 1, 7, 8)],
        [(Op.F, 1, 0, 1, 2), (Op.I, 1, 0, 2, 3), (Op.W, 1, 0, 3, 4), (Op.F, 1, 1, 4, 5), (Op.B, 1, 1, 6, 7)],
    ]
    return Timeline(tuple(tuple(Span(Action(op, s, k), a, b) for op, s, k, a, b in row) for row in rows))


def test_the_bubble_is_counted_between_first_forward_and_last_action_and_over_the_whole_step() -> None:
    """The longest such time is 8 s, that of rank 0. If rank 0 ends earlier, the two bubbles differ."""
    timeline = by_hand()
    assert timeline.busy == 9
    assert timeline.bubble_fraction == 1 - 9 / 16
    assert timeline.bubble_of_ranks == 1 - 9 / 16
    first, second = timeline.rows
    later = replace(timeline, rows=(first[:3], tuple(replace(s, start=s.start + 1, end=s.end + 1) for s in second)))
    assert later.bubble_of_ranks == pytest.approx(1 - 8 / 12)  # both ranks: 6 s
    assert later.bubble_fraction == pytest.approx(1 - 8 / 16)
    assert bubble_text(later) == ("bubble 33.3% between a rank's first F and its last action; 50.0% of the whole step")


def test_a_scaled_timeline_has_the_same_bubble() -> None:
    timeline = timeline_of("1f1b")
    assert timeline.moved(factor=0.01).bubble_of_ranks == pytest.approx(timeline.bubble_of_ranks)
    assert timeline.moved(factor=0.01).busy == pytest.approx(timeline.busy / 100)


def test_a_clock_that_is_ahead_is_set_back() -> None:
    """One action is timed twice: by a rank that has the clock of rank 0, and as if its clock were 5 s ahead."""
    cpu, action = torch.device("cpu"), Action(Op.F, 0, 1)
    starts = []
    for ahead in (0.0, 5.0):
        stopwatch = Stopwatch(cpu)
        with timed_actions(stopwatch, cpu, ClockOffset(ahead, 0.0, time.perf_counter())) as spans:
            stopwatch.mark("transfer", action)
            stopwatch.mark("forward", action)
            stopwatch.mark("transfer", Action(Op.SEND_F, 0, 1, 1))
            stopwatch.read()
        (span,) = spans
        assert span.action == action
        assert span.start <= span.end
        starts.append(span.start)
    assert starts[0] == pytest.approx(0.0, abs=0.5)
    assert starts[1] == pytest.approx(-5.0, abs=0.5)


# -- a run -------------------------------------------------------------------------------------------------------------


def write_times(folder: Path, rows: list[list[list[Any]]], **changes: Any) -> None:
    """Write the times of two steps, of which the second takes twice as long, as a run of two ranks leaves them."""
    (folder / "profile").mkdir(parents=True, exist_ok=True)
    for rank, row in enumerate(rows):
        steps = [
            {"step": step, "actions": [[op, s, k, 100 + factor * a, 100 + factor * b] for op, s, k, a, b in row]}
            for step, factor in ((3, 1.0), (4, 2.0), (5, 3.0))
        ]
        content = {
            "format": 1,
            "rank": rank,
            "world_size": 2,
            "mesh": {"pipe": 2, "data": 1, "context": 1},
            "clock_error_seconds": 25e-6 * rank,
            "steps": steps,
        } | changes
        (folder / f"profile/actions_rank_{rank}.json").write_text(json.dumps(content))


ROWS = [
    [[s.action.op.value, s.action.stage, s.action.microbatch, s.start, s.end] for s in row] for row in by_hand().rows
]


def test_the_step_of_median_length_is_read_from_its_first_action_on(tmp_path: Path) -> None:
    write_times(tmp_path, ROWS)
    measured = read_measured(tmp_path)
    assert (measured.step, measured.ranks, measured.world_size) == (4, (0, 1), 2)
    assert measured.timeline == by_hand().moved(factor=2.0)
    assert measured.clock_error == 25e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(format=2), "is damaged, or of another version"),
        (dict(mesh={"data": 2}), "is damaged"),
        (dict(mesh={"pipe": 2, "data": 10**9}), "is damaged"),
        (dict(steps=[]), "is damaged"),
        (dict(steps=[{"step": 1, "actions": [["X", 0, 0, 0, 1]]}]), "is damaged"),
        (dict(steps=[{"step": 1, "actions": [["F", 0, 0, 2, 1]]}]), "is damaged"),
        (dict(steps=[{"step": 1, "actions": []}]), "is damaged"),
        (dict(steps=7), "is damaged"),
    ],
)
def test_damaged_times_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_times(tmp_path, ROWS, **changes)
    with pytest.raises(ConfigError, match=message):
        read_measured(tmp_path)


def train_two_stages(rank: int, world_size: int, folder: Path) -> list[list[tuple[str, int, int]]]:
    """Train three steps, of which the second and third are timed, and return the plan's computes on each rank."""
    config = read_config(None, [*TINY, f"output.dir={folder}", "parallel.pipeline=2"], world_size)
    job = prepare(config, Place(rank, world_size, rank, ALONE.local_world_size))
    context = make_context(config, job.place)
    dist.barrier()  # every rank is connected before any of them writes
    if rank == 0:
        job.folder.make(config)
    engine = make_engine(context, job)
    loader = make_loader(engine, job)
    actions = ActionFile(range(2, 4), job.folder.action_times(rank), engine, say=print)
    for step in range(1, 4):
        with actions.around_step(step):
            engine.train_step(loader.training(engine.num_samples))
        assert engine.stopwatch._recorded is None  # outside of these steps nothing is kept
    plan = preview_of(config, world_size).plan(config.num_microbatches(world_size))
    return [[(a.op.value, a.stage, a.microbatch) for a in row if not a.op.is_transfer] for row in plan.ranks]


def test_a_run_leaves_its_times_and_is_drawn_below_its_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    plan = run(train_two_stages, 2, folder)[0]
    measured = read_measured(folder)
    assert measured.step in (2, 3)
    for row, expected in zip(measured.timeline.rows, plan, strict=True):
        assert [(s.action.op.value, s.action.stage, s.action.microbatch) for s in row] == expected
        assert all(one.end <= other.start + 1e-6 for one, other in pairwise(row))
        assert all(span.end > span.start for span in row)
    # On one clock no rank begins before what it waits for has ended on the other.
    ends = {s.action: s.end for row in measured.timeline.rows for s in row}
    for k in range(measured.timeline.num_microbatches):
        starts = {s.action: s.start for s in measured.timeline.rows[1]}
        assert ends[Action(Op.F, 0, k)] <= starts[Action(Op.F, 1, k)]
        first = next(s for s in measured.timeline.rows[0] if s.action.op is not Op.F and s.action.microbatch == k)
        assert ends[Action(Op.I, 1, k)] <= first.end
    out = tmp_path / "run.svg"
    assert cli.main(["timeline", "--measured", str(folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"written: {out}\n"
    svg = out.read_text()
    assert [len(row) for row in boxes_of(svg).values()] == [len(row) for row in plan] * 2
    texts = [text for _, text, _, _ in texts_of(svg)]
    assert sum(text == bubble_text(measured.timeline) for text in texts) == 1
    assert f"Measured: step {measured.step} of {folder}" in texts
    assert (
        cli.main(
            ["timeline", "--measured", str(folder), "--set", "parallel.pipeline.schedule=gpipe", "--out", str(out)]
        )
        == 2
    )
    assert capsys.readouterr().err == (
        f"--measured: {folder} ran another plan: I1.0 on rank 1, where the config has F1.1."
        f" Give the run's own config: --config {folder}/config.json.\n"
    )


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--out", "nowhere/plan.svg"],
            "--out: cannot write in nowhere: No such file or directory. Try another folder.",
        ),
        (["--out", "folder.svg"], "--out: folder.svg is a folder, and not a regular file."),
        (["--measured", "none", "--out", "x.svg"], "--measured: none is no folder of a run. Try runs/NAME."),
        (
            ["--measured", "folder.svg", "--out", "x.svg"],
            "has no times of actions (folder.svg/profile/actions_rank_0.json)."
            " Train it with --profile A:B: 10:13 times steps 10, 11 and 12.",
        ),
        (
            ["--set", "train.global_batch_size=131072", "parallel.pipeline=2", "--out", "x.svg"],
            "a step of 65,536 microbatches and 2 stages is too large to draw. Try --set train.global_batch_size=65536.",
        ),
        (["--world", "3", "--set", "parallel.pipeline=2", "--out", "x.svg"], "world size 3 is not a multiple of"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line_with_code_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.svg").mkdir()
    assert cli.main(["timeline", *arguments]) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert (shown.out, len(shown.err.splitlines())) == ("", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.svg"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "x.png"], "--out: 'x.png' ends in neither .svg nor .csv. Try timeline.svg"),
        (["--out", "x.csv", "--measured", "runs/x"], "--measured is for a picture; with --out FILE.csv leave it out"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["timeline", *arguments])
    assert ended.value.code == 2
    assert f"colonnade timeline: error: {words}" in capsys.readouterr().err


def test_a_plan_that_was_written_is_a_schedule_of_its_own(tmp_path: Path) -> None:
    """Its second writing and its picture are those of the schedule that it was written from, but for the title."""
    options = ["--set", "parallel.pipeline.size=2", "model.num_hidden_layers=4"]
    schedule = ["parallel.pipeline.schedule=interleaved"]
    for again in range(2):
        for kind in ("csv", "svg"):
            assert cli.main(["timeline", *options, *schedule, "--out", str(tmp_path / f"{again}.{kind}")]) == 0
        schedule = [f"parallel.pipeline.schedule={tmp_path / '0.csv'}"]
    assert (tmp_path / "0.csv").read_text() == (tmp_path / "1.csv").read_text()
    named = (tmp_path / "0.svg").read_text().replace("interleaved: ", f"{tmp_path / '0.csv'}: ")
    assert named == (tmp_path / "1.svg").read_text()


# -- clocks ------------------------------------------------------------------------------------------------------------


def test_the_offset_of_a_hosts_clock_is_within_its_bounds() -> None:
    """Host b's clock is 5 s ahead. Ranks enter a barrier at any time, and leave it after the last has entered."""
    ahead = {"a": 0.0, "b": 5.0}
    entered = [[0.1 * i + 0.001 * rank * (i % 3) for i in range(ROUNDS)] for rank in range(4)]
    last = [max(row[i] for row in entered) for i in range(ROUNDS)]
    every = [
        Barriers(
            host,
            [t + ahead[host] for t in entered[rank]],
            [t + 0.0002 * (1 + rank) + ahead[host] for t in last],
        )
        for rank, host in enumerate("aabb")
    ]
    low, high = zip(*bounds(every, "b", "a"), strict=True)
    assert max(low) <= 5.0 <= min(high)
    assert min(high) - max(low) < 0.002

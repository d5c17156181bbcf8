"""Pictures of timelines: every action is drawn once where it ran, and the figures are those of the timeline."""

import json
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from colonnade import cli
from parallel.config import PipelineConfig
from parallel.engine.context import Place
from parallel.errors import ConfigError
from parallel.mesh.clocks import ROUNDS, Barriers, bounds
from parallel.pipeline.drawing import COLORS, MOST_DRAWN, Panel, draw_svg, in_flight
from parallel.pipeline.plan import Action, Op
from parallel.pipeline.schedule import SCHEDULES, plan_of
from parallel.pipeline.timeline import Span, Timeline, simulate
from tests.harness import run
from tests.test_loop import ALONE, TINY
from training.config import read_config
from training.measured import read_measured
from training.preflight import prepare
from training.preview import preview_of
from training.run import run_job
from training.timelines import bubble_of_ranks, bubble_text, busy, picture, scaled

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
    return simulate(plan_of(pipeline, m, recomputes=False), costs, [2 * cost for cost in costs])


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
        levels = in_flight(computes(row))
        assert max(count for _, count in levels) == peak
        assert levels[-1][1] == 0
        assert all(one[0] <= other[0] for one, other in pairwise(levels))
    peaks = [text for _, text, _, _ in texts_of(draw_svg(name, [Panel("", timeline)])) if text.startswith("max ")]
    assert peaks == [f"max {peak}" for peak in timeline.peak_in_flight]


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
            assert all(0 <= begin and end <= width for begin, end, _ in found), found
            assert all(one[1] <= other[0] + 0.5 for one, other in pairwise(sorted(found))), found


def test_colours_differ_in_lightness_for_print() -> None:
    def lightness(color: str) -> float:
        linear = [(v / 255) ** 2.2 for v in bytes.fromhex(color[1:])]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    found = sorted(lightness(color) for color, _ in COLORS.values())
    assert all((other + 0.05) / (one + 0.05) > 1.4 for one, other in pairwise(found))


@pytest.mark.slow
def test_a_picture_of_64_ranks_and_512_microbatches_has_less_than_4_megabytes() -> None:
    svg = draw_svg("1f1b", [Panel("Planned", timeline_of("1f1b", 64, 512))])
    assert len(svg) < 4e6
    assert sum(map(len, boxes_of(svg).values())) >= 2 * 64 * 512


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
    assert busy(timeline) == 9
    assert timeline.bubble_fraction == 1 - 9 / 16
    assert bubble_of_ranks(timeline) == 1 - 9 / 16
    first, second = timeline.rows
    later = replace(timeline, rows=(first[:3], tuple(replace(s, start=s.start + 1, end=s.end + 1) for s in second)))
    assert bubble_of_ranks(later) == pytest.approx(1 - 8 / 12)  # both ranks: 6 s
    assert later.bubble_fraction == pytest.approx(1 - 8 / 16)
    assert bubble_text(later) == ("bubble 33.3% between a rank's first F and its last action; 50.0% of the whole step")


def test_a_scaled_timeline_has_the_same_bubble() -> None:
    timeline = timeline_of("1f1b")
    assert bubble_of_ranks(scaled(timeline, 0.01)) == pytest.approx(bubble_of_ranks(timeline))
    assert busy(scaled(timeline, 0.01)) == pytest.approx(busy(timeline) / 100)


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

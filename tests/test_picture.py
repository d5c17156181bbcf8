"""Every pipeline has a picture that fits the screen, whatever its size."""

import gc
import io
import random
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import launch
from parallel.pipeline.picture import draw
from parallel.pipeline.plan import Action, Op, Plan
from parallel.pipeline.schedule import SCHEDULES
from parallel.pipeline.timeline import MOST_SIMULATED, Costs, Timeline, num_simulated, simulate
from parallel.pipeline.transfers import with_transfers
from tests.patience import patient
from tests.tables import ROOT
from training.config import read_config
from training.layout_report import print_layout
from training.preview import preview_of

NAMES = st.sampled_from(sorted(SCHEDULES))
CHUNKS = {"interleaved": 2, "zero_bubble_v": 2}


def timeline_of(name: str, p: int, m: int, costs: list[float] | None = None, simulated: int | None = None) -> Timeline:
    """Return the timeline of a step, of which as many microbatches are simulated as in a run's report."""
    simulated, chunks = simulated or num_simulated(p, m), CHUNKS.get(name, 1)
    costs = (costs or [1.0] * p) * chunks
    plan = with_transfers(SCHEDULES[name](p, simulated, chunks))
    return replace(simulate(plan, Costs.halves(costs, [2 * cost for cost in costs])), num_omitted=m - simulated)


def rows_of(picture: str) -> list[str]:
    return [line for line in picture.splitlines() if line.startswith("rank ")]


@settings(max_examples=30)
@given(NAMES, st.integers(2, 16), st.integers(1, 60), st.integers(60, 200), st.randoms(use_true_random=False))
def test_every_picture_fits_and_has_a_row_for_each_rank(
    name: str, p: int, m: int, width: int, rng: random.Random
) -> None:
    picture = draw(timeline_of(name, p, m, [rng.uniform(1, 2) for _ in range(p)]), width)
    assert max(map(len, picture.splitlines())) <= width
    assert len(rows_of(picture)) == p
    for row in rows_of(picture):
        if m >= p:  # a column may last longer than the only microbatch
            assert "F" in row
            assert "B" in row or "I" in row


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_largest_pipeline_is_drawn_within_a_second_for_each_stage_of_a_rank(name: str) -> None:
    """Garbage collection is off, since a process that has imported torch would traverse all objects of torch's. (The
    command line exempts them from it.)"""
    gc.disable()
    try:
        began = time.process_time()
        timeline = timeline_of(name, 64, 65_536)
        pictures = {width: draw(timeline, width) for width in (60, 200)}
        seconds = time.process_time() - began
    finally:
        gc.enable()
    assert seconds < patient(1.0 * CHUNKS.get(name, 1))
    for width, picture in pictures.items():
        assert max(map(len, picture.splitlines())) <= width
        assert len(rows_of(picture)) == 64


def test_what_fits_is_drawn_whole_and_a_letter_stands_for_each_compute_where_labels_do_not_fit() -> None:
    timeline = timeline_of("1f1b", 2, 3)
    assert draw(timeline, 60) == draw(timeline)
    assert rows_of(draw(timeline, 60))[0] == "rank 0  F0 F1 .. .. B0--- F2 B1--- .. B2---"
    assert rows_of(draw(timeline, 30)) == ["rank 0  FF..BBFBB.BB", "rank 1  .FBBFBBFBB.."]


def test_letters_of_long_columns_are_as_frequent_as_what_they_stand_for() -> None:
    """Nearly all were once backwards where a column, as here, lasts about a forward and a backward."""
    timeline = timeline_of("1f1b", 40, 41)  # squeezed: the warm-up and the cool-down are nearly all of it
    last = rows_of(draw(timeline, 50))[-1].partition("  ")[2].replace(" … ", "")
    assert last.count("B") == pytest.approx(2 * last.count("F"), abs=3)


def test_the_middle_that_is_left_out_is_marked_and_counted() -> None:
    picture = draw(timeline_of("1f1b", 2, 40), 80)
    first, last = (row.removeprefix(f"rank {rank}  ").split(" … ") for rank, row in enumerate(rows_of(picture)))
    assert first[0].startswith("F0- F1- ")
    assert first[1].endswith("B39----")
    assert last[1].rstrip(" .").endswith("B39----")
    labels = {int(label.strip("-FB")) for row in (*first, *last) for label in row.split() if label.strip("-.")}
    assert f"{40 - len(labels)} of 40 microbatches are not drawn" in picture
    assert "of 40 microbatches" not in draw(timeline_of("1f1b", 2, 40), 700)


def test_a_long_step_that_is_simulated_in_part_has_the_picture_and_figures_of_the_whole() -> None:
    """The reference is the same step simulated whole: labels and figures are those."""
    for name in SCHEDULES:
        whole = timeline_of(name, 3, 300, simulated=300)
        part = timeline_of(name, 3, 300, simulated=102)
        assert part.makespan == whole.makespan
        assert part.bubble_fraction == pytest.approx(whole.bubble_fraction, abs=1e-12)
        assert part.peak_in_flight == whole.peak_in_flight
    cut = [draw(timeline_of("1f1b", 3, 300, simulated=n), 120).splitlines() for n in (300, 102)]
    assert cut[0] == cut[1]
    assert any("F299" in line for line in cut[0])


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("p", [3, 4, 7])
def test_a_part_of_a_step_of_no_whole_rounds_has_its_peaks_and_within_a_hundredth_its_times(name: str, p: int) -> None:
    for m in (41 * p + 1, 42 * p - 1):
        whole, part = (timeline_of(name, p, m, simulated=simulated) for simulated in (m, 20 * p + 1))
        assert part.peak_in_flight == whole.peak_in_flight
        assert part.makespan == pytest.approx(whole.makespan, rel=0.01)
        assert part.bubble_fraction == pytest.approx(whole.bubble_fraction, abs=0.01)
        assert part.bubble_of_ranks == pytest.approx(whole.bubble_of_ranks, abs=0.01)


@settings(max_examples=15)
@given(NAMES, st.integers(2, 5), st.randoms(use_true_random=False))
def test_the_bubble_of_a_part_is_that_of_the_whole_for_stages_of_any_cost(
    name: str, p: int, rng: random.Random
) -> None:
    """A microbatch that is left out takes the time of the slowest rank. Rendezvous adds up to 1% to that."""
    costs = [rng.uniform(1, 2) for _ in range(p)]
    whole, part = (timeline_of(name, p, 20 * p, costs, simulated) for simulated in (20 * p, 6 * p))
    assert part.makespan == pytest.approx(whole.makespan, rel=0.01)
    assert part.bubble_fraction == pytest.approx(whole.bubble_fraction, abs=0.01)


def test_whole_rounds_of_the_pipe_stay_whole() -> None:
    assert num_simulated(4, 100) == 100
    assert num_simulated(64, MOST_SIMULATED) % 64 == 0
    assert num_simulated(7, 7 * 10_000) % 7 == 0
    assert num_simulated(7, 7 * 10_000 + 3) % 7 == 1


def test_a_rank_with_several_stages_is_drawn_too() -> None:
    """Two stages on each of two ranks, as an interleaved schedule has them: rank r holds stages r and r + 2."""
    order = [(Op.F, 0), (Op.F, 1), (Op.F, 2), (Op.F, 3), (Op.B, 3), (Op.B, 2), (Op.B, 1), (Op.B, 0)]
    computes = {
        rank: [(op, stage, k) for k in range(20) for op, stage in order if stage % 2 == rank] for rank in range(2)
    }
    plan = Plan(tuple(tuple(Action(*one) for one in computes[rank]) for rank in range(2)), 4, 20)
    timeline = simulate(with_transfers(plan), Costs(1, 1, 1))
    assert rows_of(draw(timeline))[0].startswith("rank 0  F0.0- ..... F2.0- ")
    for width in (60, 100):
        picture = draw(timeline, width)
        assert max(map(len, picture.splitlines())) <= width
        assert len(rows_of(picture)) == 2


def test_a_check_draws_a_pipeline_of_any_length(capsys: pytest.CaptureFixture[str]) -> None:
    """Wider than the screen, it once was only a bubble, and of more than 20,000 microbatches nothing at all."""
    for batch in ("96", "65536"):
        sets = ["parallel.pipeline=4", f"train.global_batch_size={batch}", "train.micro_batch_size=1"]
        assert launch.main(launch.read_arguments(["--check", "--world", "4", "--set", *sets])) == 0
        shown = capsys.readouterr().out
        assert len(rows_of(shown)) == 4
        assert "microbatches are not drawn" in shown
        assert "bubble" in shown


@pytest.mark.parametrize(("width", "columns"), [(80, 5), (74, 2), (60, 2), (40, 1)])
def test_the_table_of_stages_cuts_no_number_off_on_a_narrow_screen(width: int, columns: int) -> None:
    """A number of which the last digits are cut is another number: then there are fewer columns."""
    config = read_config(str(ROOT / "configs" / "opt_6p7b_pp4_1d.py"), [], 32)
    console = Console(width=width, file=io.StringIO())
    with console.capture() as printed:
        print_layout(console, preview_of(config, 32), [])
    rows = [row for row in printed.get().splitlines() if row.startswith("│ pipe") and "iB" in row]
    assert [row.count("│") - 3 for row in rows] == [columns] * 4
    assert all(len(row) <= width and "…" not in row and row.endswith("GiB │") for row in rows)
    assert [("235,687,936" in row) for row in rows] == [columns > 1, False, False, False]

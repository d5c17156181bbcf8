"""The plan of a config, as a picture or as a file of its own, with a run as it happened below it."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from parallel.errors import ConfigError
from parallel.pipeline.drawing import MOST_DRAWN, Panel, draw_svg
from parallel.pipeline.plan_csv import csv_of
from parallel.pipeline.timeline import Span, Timeline
from parallel.regular_file import check_regular, with_key
from parallel.storage.no_room import disk_problem, naming
from parallel.storage.replaced_file import replacing
from training.measured import Measured, check_plan
from training.preview import Preview
from training.text import plural


def schedule_csv(preview: Preview) -> str:
    """Return the plan as the CSV that torch's pipelining and `parallel.pipeline.schedule` read."""
    return csv_of(preview.plan(preview.num_microbatches))


def picture(preview: Preview, measured: Measured | None = None, run: Path = Path()) -> str:
    """Return an SVG of the plan, simulated by estimated costs, and of a step of a run below it on the same scale.

    The plan then computes as long, over all ranks, as the run did. Raises ConfigError for a step that is too large, or
    a run of another plan.
    """
    pipeline, num_microbatches = preview.config.parallel.pipeline, preview.num_microbatches
    if pipeline.num_stages * num_microbatches > MOST_DRAWN:
        most = MOST_DRAWN // pipeline.num_stages
        size = preview.config.train.micro_batch_size * preview.topology.shape["data"] * most
        raise ConfigError(
            f"train.global_batch_size: a step of {num_microbatches:,} microbatches and"
            f" {plural(pipeline.num_stages, 'stage')} is too large to draw. Try --set train.global_batch_size={size}."
        )
    planned = preview.timeline(whole=True)
    title = f"{pipeline.schedule}: {plural(pipeline.size, 'rank')}"
    title += f" × {pipeline.num_chunks} stages" if pipeline.num_chunks > 1 else ""
    title += f", {plural(num_microbatches, 'microbatch', 'microbatches')}"
    if measured is None:
        return draw_svg(title, [Panel("Planned, by estimated costs", planned, (bubble_text(planned),))])
    check_plan(measured, planned, run)
    planned = scaled(planned, measured.timeline.busy / planned.busy)
    wrong = f"; clocks of the ranks agree within {1e6 * measured.clock_error:.0f} µs" if measured.clock_error else ""
    ranks = f", ranks {', '.join(map(str, measured.ranks))}" if measured.world_size > len(measured.ranks) else ""
    panels = [
        Panel("Planned, by estimated costs, as long in all as what was measured", planned, (bubble_text(planned),)),
        Panel(
            f"Measured: step {measured.step} of {run}{ranks}",
            measured.timeline,
            (bubble_text(measured.timeline) + wrong,),
        ),
    ]
    return draw_svg(title, panels, unit="ms" if measured.timeline.end_of_rows < 10 else "s")


def bubble_text(timeline: Timeline) -> str:
    """Return the two bubbles of a timeline: that of Qi et al., and that of the whole step."""
    return (
        f"bubble {timeline.bubble_of_ranks:.1%} between a rank's first F and its last action;"
        f" {timeline.bubble_fraction:.1%} of the whole step"
    )


def scaled(timeline: Timeline, factor: float) -> Timeline:
    """Return the timeline with all times multiplied by a factor."""

    def row_of(row: Sequence[Span]) -> tuple[Span, ...]:
        return tuple(replace(span, start=factor * span.start, end=factor * span.end) for span in row)

    return replace(timeline, rows=tuple(map(row_of, timeline.rows)))


def check_writable(target: Path) -> None:
    """Raise ConfigError if this file cannot be written. Nothing is changed."""
    if os.path.lexists(target):
        check_regular(target, with_key(ConfigError, "--out"))
    try:
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise ConfigError(f"--out: cannot write in {target.parent}: {error.strerror}. Try another folder.") from error


def write(text: str, target: Path) -> None:
    """Write a text to a file, which is replaced whole or not at all. Raises ConfigError where there is no room."""
    try:
        with naming(target), replacing(target) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise ConfigError(f"--out: {disk_problem(error)}") from error

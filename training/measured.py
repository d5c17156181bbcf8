"""A step of a run as it happened, read from the times of actions that `--profile` leaves."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median_low
from typing import Any

from parallel.errors import ConfigError
from parallel.mesh.topology import Topology
from parallel.plan.plan import Action, Op
from parallel.plan.timeline import Span, Timeline
from parallel.regular_file import read_json, with_key
from training.action_files import FORMAT
from training.run_folder import RunFolder

KEY = "--measured"
MOST_BYTES = 1 << 28  # of the file of one rank
COMPUTES = {op.value: op for op in Op if not op.is_transfer}


@dataclass(frozen=True)
class Measured:
    """A step of a run: the computes of the ranks of one pipe, in seconds from the start of the first.

    `ranks` are these ranks' numbers in a world of `world_size`. Times of different ranks are compared with an error of
    at most `clock_error` seconds.
    """

    step: int
    world_size: int
    ranks: tuple[int, ...]
    timeline: Timeline
    clock_error: float


def read_measured(run: Path) -> Measured:
    """Return the step of median length among those whose times a run has left. Raises ConfigError.

    The pipe is the one whose ranks have the coordinate 0 on every other axis.
    """
    folder = RunFolder(run, resumed=True)
    if not os.path.isdir(run):
        raise ConfigError(f"{KEY}: {run} is no folder of a run. Try runs/NAME.")
    if not os.path.exists(folder.action_times(0)):
        raise ConfigError(
            f"{KEY}: {run} has no times of actions ({folder.action_times(0)}). Train it with --profile A:B: 10:13 times"
            " steps 10, 11 and 12."
        )
    first = _read(folder.action_times(0))
    topology = Topology(first["mesh"])
    ranks = topology.first_pipe
    files = [first, *(_read(folder.action_times(rank)) for rank in ranks[1:])]
    steps = [each["step"] for each in first["steps"]]
    if any([each["step"] for each in file["steps"]] != steps or file["mesh"] != first["mesh"] for file in files):
        raise ConfigError(f"{KEY}: the times of actions in {folder.profile} are of several runs. Train with --profile.")
    timelines = {step: _timeline([file["steps"][i]["actions"] for file in files]) for i, step in enumerate(steps)}
    usual = median_low(timeline.end_of_rows for timeline in timelines.values())
    step = next(step for step, timeline in timelines.items() if timeline.end_of_rows == usual)
    error = max(file["clock_error_seconds"] for file in files)
    return Measured(step, topology.world_size, ranks, timelines[step], error)


def _timeline(rows: Sequence[Sequence[Span]]) -> Timeline:
    """Return the timeline of these rows, in seconds from the first start."""
    return Timeline(tuple(map(tuple, rows))).moved(by=-min(span.start for row in rows for span in row))


def _read(file: Path) -> dict[str, Any]:
    """Return the content of a rank's file, with its actions as spans. Raises ConfigError for any other content."""
    content = read_json(file, with_key(ConfigError, KEY), at_most=MOST_BYTES, links=True)
    try:
        assert content["format"] == FORMAT
        mesh, error = content["mesh"], content["clock_error_seconds"]
        assert isinstance(mesh, dict)
        assert "pipe" in mesh
        assert all(isinstance(size, int) and 1 <= size <= 1 << 20 for size in mesh.values())
        assert isinstance(error, float | int)
        assert 0 <= error < 1e9
        steps = [{"step": int(each["step"]), "actions": _spans(each["actions"])} for each in content["steps"]]
        assert steps
    except (AssertionError, KeyError, TypeError, ValueError, IndexError) as cause:
        raise ConfigError(f"{KEY}: {file} is damaged, or of another version. Train with --profile again.") from cause
    return {"mesh": mesh, "clock_error_seconds": error, "steps": steps}


def _spans(rows: Sequence[Sequence[Any]]) -> list[Span]:
    spans = [Span(Action(COMPUTES[op], int(stage), int(k)), float(a), float(b)) for op, stage, k, a, b in rows]
    assert spans
    assert all(isfinite(span.start) and isfinite(span.end) and span.start <= span.end for span in spans)
    return spans


def check_plan(measured: Measured, planned: Timeline, run: Path) -> None:
    """Raise ConfigError where the run has computed something else than this plan, rank by rank."""
    advice = f"Give the run's own config: --config {run / 'config.json'}."
    rows = [[[span.action for span in row] for row in t.computes] for t in (measured.timeline, planned)]
    if len(rows[0]) != len(rows[1]):
        raise ConfigError(f"{KEY}: {run} has {len(rows[0])} ranks in its pipe, and the config {len(rows[1])}. {advice}")
    for rank, (ran, plan) in enumerate(zip(*rows, strict=True)):
        at = next((i for i, pair in enumerate(zip(ran, plan, strict=False)) if pair[0] != pair[1]), None)
        if at is not None:
            where = f"{ran[at]} on rank {rank}, where the config has {plan[at]}"
        elif len(ran) != len(plan):
            where = f"{len(ran)} actions on rank {rank}, where the config has {len(plan)}"
        else:
            continue
        raise ConfigError(f"{KEY}: {run} ran another plan: {where}. {advice}")

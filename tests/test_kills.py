"""A run that is killed and goes on with `--resume auto` leaves the same files as one that nothing interrupts."""

import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness import run
from tests.kill_draws import calls_of
from tests.killed_runs import LARGER, LAYOUTS, differences, start, start_killed
from tests.killer import Kill, calls_folder
from tests.test_loop import prepared
from training.run import run_job

KILLS = {
    "one rank, validated": Kill(0, "_delete_old", 3, in_background=True),  # after the last save
    "ZeRO 1": Kill(1, "ChunkSum.wait", 32),
    "ZeRO 3, validated": Kill(1, "write_files", 2, in_background=True),
    "offloaded": Kill(0, "AdamW.step", 6),
    "placed by a plan": Kill(0, "Runner._backward", 13),
    "on disk": Kill(0, "Runner._forward", 22),
    "fp16 with overflows": Kill(0, "LossScale.update", 6),
    "bf16 with bf16 moments": Kill(1, "Runner._backward", 10),
    "a ring": Kill(0, "write_sums", 2, in_background=True),
    "a pipeline, validated": Kill(1, "Engine.evaluate", 3),
    "1d": Kill(0, "write_json", 2, in_background=True),
    "2d": Kill(0, "_rename", 2, in_background=True),
    "Llama in 1d": Kill(0, "_point", 5, in_background=True),
}
"""A kill of each layout. It comes after the second save has begun, so that the first one is complete for certain."""


def nothing(rank: int, world_size: int) -> None:
    """Do nothing."""


@pytest.fixture(scope="module", autouse=True)
def _server() -> None:
    """Start the server of which all ranks are forks, with what they would import each time."""
    run(nothing, 1)


@pytest.fixture(autouse=True)
def _leaves_signals_alone() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "Llama in 1d" else name for name in LAYOUTS]
)
def test_a_killed_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    layout, kill = LAYOUTS[name], KILLS[name]
    assert start(layout, tmp_path / "whole") == 0
    assert start_killed(layout, tmp_path / "killed", kill) == 5
    assert start(layout, tmp_path / "killed", "--resume", "auto") == 0
    assert differences(tmp_path / "killed", tmp_path / "whole") == []


def test_a_run_without_steps_left_leaves_the_only_whole_checkpoint_where_it_is(tmp_path: Path) -> None:
    """Its save was killed while it replaced a checkpoint of the same step; the newer one was damaged. Neither is
    deleted before another save has ended.
    """
    every, folder = "output.checkpoint_every=3", tmp_path / "run" / "checkpoints"
    run_job(prepared(tmp_path / "run", every))
    (folder / "step_000006").rename(folder / ".step_000006.replaced")
    run_job(prepared(tmp_path / "run", every, resume="auto"))
    assert (folder / ".step_000006.replaced" / "checkpoint.json").exists()
    (folder / ".step_000006.replaced").rename(folder / "step_000006")
    (folder / "step_000006" / "rank_00000.safetensors").write_bytes(b"")
    run_job(prepared(tmp_path / "run", every, "train.steps=3", resume="auto"))
    assert (folder / ".step_000006.damaged").exists()
    assert (folder / "step_000003" / "checkpoint.json").exists()


PHASES = {
    "forward": "Runner._forward",
    "backward": "Runner._backward",
    "reduction": "ChunkSum.wait",
    "update": "AdamW.step",
    "writing of metrics": "MetricsFile.on_step",
    "log": "StepLog.on_step",
    "evaluation": "Engine.evaluate",
    "writing of tensors": "write_files",
    "writing of the index": "write_json",
    "writing of the checksums": "write_sums",
    "renaming": "_rename",
    "pointing": "_point",
    "deletion of old ones": "_delete_old",
    "export": "export_model",
    "plot": "plot_loss",
}


@dataclass(frozen=True)
class Place:
    """A function as one rank called it in the uninterrupted run, on its main thread or in the background."""

    function: str
    rank: int
    in_background: bool
    calls: int


def drawn_places(draw: random.Random, run: Path) -> list[Place]:
    """Return a place of each phase that the run had. Those of the end of a run come last: it has no steps left then.

    The same function may be called in each save, and once more at the end: the former is taken.
    """
    found = []
    for function in PHASES.values():
        every = [
            Place(function, rank, kind == "background", calls[function])
            for kind in ("main", "background")
            for rank, calls in enumerate(calls_of(run, kind))
            if function in calls
        ]
        often = [place for place in every if 2 * place.calls >= max(other.calls for other in every)]
        found += [draw.choice(often)] if often else []
    return sorted(found, key=lambda place: place.calls == 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LAYOUTS, *LARGER])
def test_a_run_that_is_killed_in_every_phase_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    """One run is killed in one phase after another, on a rank that is drawn, at a call that is drawn.

    A phase that the layout lacks, or that this rank has not, is left out.
    """
    draw, layout, longer = random.Random(name), (LAYOUTS | LARGER)[name], ("train.steps=20",)
    calls_folder(tmp_path / "whole").mkdir()
    assert start(layout, tmp_path / "whole", more=longer) == 0
    for place in drawn_places(draw, tmp_path / "whole"):
        most = max(1, place.calls // 2 // len(PHASES))
        kill = Kill(place.rank, place.function, draw.randint(1, most), in_background=place.in_background)
        print(f"{name}: {kill}", flush=True)
        assert start_killed(layout, tmp_path / "killed", kill, more=longer) == 5
    assert start(layout, tmp_path / "killed", "--resume", "auto", more=longer) == 0
    assert differences(tmp_path / "killed", tmp_path / "whole") == []

"""A run that is killed and goes on with `--resume auto` leaves the same files as one that nothing interrupts."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import run
from tests.killed_runs import LAYOUTS, assert_same_run, start, start_killed
from tests.killer import Kill

KILLS = {
    "one rank, validated": Kill(0, "Engine.evaluate", 2),
    "ZeRO 1": Kill(1, "ChunkSum.wait", 20),
    "ZeRO 3, validated": Kill(1, "write_tensors", 2),
    "offloaded": Kill(0, "AdamW.step", 4),
    "placed by a plan": Kill(0, "Runner._backward", 13),
    "on disk": Kill(0, "Runner._forward", 13),
    "fp16 with overflows": Kill(0, "LossScale.update", 4),
    "bf16 with bf16 moments": Kill(1, "Runner._backward", 10),
    "a ring": Kill(0, "write_sums", 2),
    "a pipeline, validated": Kill(1, "Engine.evaluate", 2),
    "1d": Kill(0, "write_json", 2),
    "2d": Kill(0, "_rename", 2),
    "Llama in 1d": Kill(0, "_point", 5),
}


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


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_killed_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    layout, kill = LAYOUTS[name], KILLS[name]
    assert start(layout, tmp_path / "whole") == 0
    assert start_killed(layout, tmp_path / "killed", kill) == 5
    assert start(layout, tmp_path / "killed", "--resume", "auto") == 0
    assert_same_run(tmp_path / "killed", tmp_path / "whole")

"""A callback that ends its own run as the environment says, and the files by which two runs are compared."""

import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from training.callbacks import Callback, Run
from training.metrics import MetricsLine, read

VARIABLE = "COLONNADE_TEST_ENDING"
NAME = "tests.ending:Ending"

TIMES = {"step_seconds", "phases", "tokens_per_second", "tflops", "mfu", "peak_host_bytes", "peak_device_bytes"}


@dataclass(frozen=True)
class Planned:
    """The plan of an end on a rank after a step, in torchrun's first attempt: a signal's number, or 0: an exception."""

    number: int = 0
    step: int = 3
    rank: int = 0

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}


class Ending(Callback):
    """Does what was planned."""

    on_every_rank = True

    def on_start(self, run: Run) -> None:
        self._rank = run.rank
        self._planned = Planned(**json.loads(os.environ[VARIABLE])) if VARIABLE in os.environ else None

    def on_step(self, line: MetricsLine) -> None:
        plan = self._planned
        is_first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if plan is None or not is_first_attempt or (line["step"], self._rank) != (plan.step, plan.rank):
            return
        if not plan.number:
            raise KeyError("of the callback")
        os.kill(os.getpid(), plan.number)
        if plan.number == signal.SIGTERM:
            os.kill(os.getpid(), plan.number)  # a terminal and a launcher both send it: it is the same one


def ended(run: Path) -> dict[str, Any]:
    """Return what ended.json of a run says."""
    found: dict[str, Any] = json.loads((run / "ended.json").read_text())
    return found


def lines(run: Path) -> list[MetricsLine]:
    """Return the lines of metrics.jsonl without the keys in which any two runs differ."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read(run / "metrics.jsonl")]


def tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Return all tensors of the checkpoint of a step, with the states of the optimizer."""
    found: dict[str, Tensor] = {}
    for file in sorted((run / "checkpoints" / f"step_{step:06d}").glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_run(run: Path, other: Path, *, last_step: int) -> None:
    """Assert that two runs have the same metrics and the same state, to the last bit."""
    assert lines(run) == lines(other), "the metrics differ"
    ours, theirs = tensors(run, last_step), tensors(other, last_step)
    assert ours.keys() == theirs.keys() != set(), "the checkpoints have other tensors"
    differing = [name for name in ours if not ours[name].equal(theirs[name])]
    assert differing == [], differing

"""A run of ten thousand steps that saves, evaluates and logs holds no more at its end than after its warm-up.

COLONNADE_SOAK_STEPS=2000 pytest -m slow tests/test_soak.py
"""

import os
from pathlib import Path

import pytest

from tests.killed_runs import OPT, Layout, lines_of, start
from tests.killer import ROOT
from tests.soak_probe import APART, OFFSET, samples_of
from tests.test_kills import _leaves_signals_alone, _server  # noqa: F401 (fixtures)

NUM_STEPS = int(os.environ.get("COLONNADE_SOAK_STEPS", "10000"))
WARM_UP = 2 * APART  # steps
ROOM = 8 * 2**20  # bytes that resident memory may vary by: allocators keep what they have freed
IN_CONTAINERS = 2**16  # bytes: a list that grows by one reference a step grows by 8 bytes a step, 72,000 in all

SAVED = (
    f"train.steps={NUM_STEPS}",
    "train.global_batch_size=2",
    "train.micro_batch_size=1",
    "zero.stage=3",
    "zero.tensor_placement_policy=cpu",
    "output.checkpoint_every=50",
    "output.eval_every=200",
    "output.keep_best=True",
    "output.log_every=1000",
    f"output.callbacks=('{ROOT / 'tests' / 'soak_probe.py'}:Probe',)",
    "data.sequence_length=8",
)
RUNS = {
    "in a pipeline": Layout(2, (*SAVED, "parallel.pipeline=2"), OPT),
    "over two replicas": Layout(2, SAVED, OPT),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", RUNS)
def test_ten_thousand_steps_leave_nothing_behind(name: str, tmp_path: Path) -> None:
    assert start(RUNS[name], tmp_path / "run") == 0
    assert len(lines_of(tmp_path / "run")) == NUM_STEPS
    for samples in samples_of(tmp_path / "run"):
        print(*samples, sep="\n")
        assert len(samples) == (NUM_STEPS - OFFSET) // APART + 1
        after = [sample for sample in samples if sample.step > WARM_UP]
        assert len({(sample.files, sample.threads) for sample in after}) == 1
        resident, containers = ([getattr(x, key) for x in after] for key in ("resident", "containers"))
        assert max(resident) - min(resident) <= ROOM
        assert max(containers) - min(containers) <= IN_CONTAINERS

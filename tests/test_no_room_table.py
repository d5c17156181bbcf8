"""The table of what a run does where a memory or a disk has no room: a run of its own plays each row."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.small_disk import command_on_small_disk, needs_mounts
from tests.tables import Row, rows
from tests.test_out_of_memory import EXHAUST, ends_of_run

TABLE = rows("docs/faults.md", "No room")
MIB = 2**20
SMALL = (
    *("model.hidden_size=32", "model.ffn_dim=64", "model.num_hidden_layers=2", "data.sequence_length=32"),
    *("train.steps=4", "train.timeout_seconds=5", "output.log_every=1"),
)

FILL = """
from tests.small_disk import fill
from training.callbacks import Callback
from pathlib import Path
import os

class Fill(Callback):
    def on_step(self, line):
        if line["step"] == int(os.environ["FILL_AT"]):
            self.filler = fill(Path(os.environ["DISK"]))
        if line["step"] == int(os.environ.get("FREE_AT", "0")):
            self.filler.unlink()
"""


def train(
    disk: Path, num_bytes: int, *values: str, before: str = "", options: str = ""
) -> subprocess.CompletedProcess[str]:
    """Train with the run's folder on a disk of so many bytes; what is left there is copied beside it, as left/."""
    (disk.parent / "fill.py").write_text(FILL)
    assignments = " ".join(f"'{value}'" for value in (*SMALL, f"output.dir={disk}/run", *values))
    train = f"{before} {sys.executable} -m colonnade train {options} --set {assignments}"
    return command_on_small_disk(disk, num_bytes, f"{train}; code=$?; cp -r $DISK left; exit $code", timeout=300)


def in_first_step(folder: Path) -> subprocess.CompletedProcess[str]:
    done = ends_of_run(folder, "forward", 0)
    assert "no room in the memory of cpu at step 1, forward" in done.stderr
    return done


def in_a_later_step(folder: Path) -> subprocess.CompletedProcess[str]:
    done = ends_of_run(folder, "update", 2)
    assert "no room in the memory of cpu at step 3, update" in done.stderr
    return done


def killed(folder: Path) -> subprocess.CompletedProcess[str]:
    """The system's counter is that of tests/test_out_of_memory.py; here is the exit code of a rank that is killed."""
    dies = EXHAUST.replace("raise torch.OutOfMemoryError", "os.kill(os.getpid(), 9)  #")
    return ends_of_run(folder, "update", 2, source=dies)


def folder_of_the_run(folder: Path) -> subprocess.CompletedProcess[str]:
    done = train(folder / "disk", MIB, before="head -c 2m /dev/zero > $DISK/filler 2> /dev/null;")
    assert re.search(r"No space left on device|cannot write in", done.stderr)
    return done


def a_checkpoint(folder: Path) -> subprocess.CompletedProcess[str]:
    done = train(folder / "disk", 4 * MIB, "output.checkpoint_every=1", "output.keep_checkpoints=9")
    assert "rank_00000.safetensors: No space left on device" in done.stderr
    assert "A checkpoint needs 1.04 MiB; the ones before are whole." in done.stderr
    assert len(done.stderr.splitlines()) == 1
    left = sorted(path.name for path in (folder / "left/run/checkpoints").iterdir())
    assert left == ["latest", "step_000001", "step_000002", "step_000003"]
    return done


def the_export(folder: Path) -> subprocess.CompletedProcess[str]:
    done = train(folder / "disk", MIB // 4)
    assert "No space left on device" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list((folder / "left/run").glob("export/*")) == []
    return done


def states(folder: Path) -> subprocess.CompletedProcess[str]:
    zero = ("zero.tensor_placement_policy=cpu", "zero.nvme_dir=disk/states", "zero.host_memory=19MiB")
    shape = ("model.hidden_size=64", "model.ffn_dim=256", "model.num_hidden_layers=24")
    done = train(folder / "disk", MIB, "output.dir=run", *zero, *shape)
    assert "zero.nvme_dir: " in done.stderr
    return done


def the_cache(folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "text.txt").write_text("".join(f"some words {i}\n" for i in range(100000)))
    before = "COLONNADE_CACHE=$DISK/cache"
    done = train(folder / "disk", MIB // 2, "output.dir=run", "data.path=text.txt", before=before)
    assert "COLONNADE_CACHE: tokens cannot be kept in " in done.stderr
    assert "No space left on device" in done.stderr
    return done


def metrics_and_logs(folder: Path) -> subprocess.CompletedProcess[str]:
    before = "FILL_AT=1 FREE_AT=30"
    values = ("train.steps=40", "output.export=False", 'output.callbacks=["fill.py:Fill"]')
    done = train(folder / "disk", MIB, *values, before=before)
    assert done.stdout.count("metrics.jsonl cannot be written: No space left on device; the run goes on") == 1
    assert re.search(r"metrics\.jsonl is incomplete: steps \d+ to 3\d are missing", done.stdout)
    assert "Traceback" not in done.stderr
    steps = [json.loads(line)["step"] for line in (folder / "left/run/metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 40
    assert steps == sorted(set(steps))
    assert len(steps) < 40
    assert done.stderr.count("rank_0.log cannot be written") == 1
    return done


def tensorboard(folder: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("tensorboard")
    values = (
        "output.export=False",
        'output.loggers=["tensorboard"]',
        "train.steps=60",
        'output.callbacks=["fill.py:Fill"]',
    )
    done = train(folder / "disk", MIB, *values, before="FILL_AT=1")
    assert "Traceback" not in done.stderr
    assert re.search(r"tensorboard (cannot be written|is incomplete)", done.stdout)
    return done


def trace_and_plot(folder: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("matplotlib")
    values = ("output.export=False", 'output.callbacks=["fill.py:Fill"]')
    done = train(folder / "disk", MIB, *values, before="FILL_AT=1", options="--profile 2:3")
    assert "no trace: " in done.stdout
    assert "no loss.png: " in done.stdout
    assert not list((folder / "left/run").glob("**/*.incomplete*"))
    return done


PLAYS: dict[str, Callable[[Path], subprocess.CompletedProcess[str]]] = {
    "the device or the host, before the first step is complete": in_first_step,
    "the device or the host, later: in a step, an evaluation, a save, an export": in_a_later_step,
    "the host, so that the system kills a rank": killed,
    "the folder of the run, when it starts": folder_of_the_run,
    "a checkpoint": a_checkpoint,
    "the export at the end of a run": the_export,
    "optimizer states in `zero.nvme_dir`": states,
    "the cache of tokens": the_cache,
    "`metrics.jsonl` and `logs/`": metrics_and_logs,
    "`tensorboard/`": tensorboard,
    "a trace of `--profile`, `loss.png`": trace_and_plot,
}


def test_every_row_is_played() -> None:
    assert [row.what for row in TABLE] == list(PLAYS)


@pytest.mark.slow
@needs_mounts
@pytest.mark.parametrize("row", TABLE, ids=str)
def test_a_run_does_what_the_row_says(row: Row, tmp_path: Path) -> None:
    ends = re.match(r"ends with (\d)", row.answer)
    assert ends or row.answer.startswith("goes on")
    done = PLAYS[row.what](tmp_path)
    assert done.returncode == (int(ends[1]) if ends else 0), done.stderr + done.stdout

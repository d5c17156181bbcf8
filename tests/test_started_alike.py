"""Ranks that were started in different ways are refused, by what differs and on which rank, before they share data."""

import os
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.parting import Program, part, play

CONFIG = """
model = dict(name="opt-tiny", hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2)
data = dict(tokenizer="bytes", sequence_length=32, validation_fraction=0)
train = dict(device="cpu", steps=1, global_batch_size=12, micro_batch_size=2, timeout_seconds=5)
output = dict(checkpoint_every=1, export=False)
"""
TEXT = "Ranks that are started alike train alike. " * 100


def make_inputs(folder: Path) -> None:
    """Write a config and a text, and another one of each."""
    (folder / "text.txt").write_text(TEXT)
    (folder / "other.txt").write_text(TEXT.replace("alike", "apart"))
    (folder / "config.py").write_text(CONFIG)
    (folder / "other.py").write_text(CONFIG + "optimizer = dict(lr=0.5)\n")


def call(folder: Path, *arguments: str) -> int:
    import launch

    given = ["--config", f"{folder}/config.py", "--set", f"data.path={folder}/text.txt", f"output.dir={folder}/run"]
    return launch.main(launch.read_arguments([*given, *arguments]))


def started_differently(what: str, folder: Path, rank: int, marks: Path) -> None:
    """Start a rank of `colonnade train`; rank 1 differs in `what`."""
    part(marks)
    os.environ["COLONNADE_CACHE"] = str(folder / "cache")
    arguments = OPTIONS.get(what, ((), ()))[rank]
    if rank == 1 and what == "world size":
        os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = "3"
    if rank == 1 and what == "package":
        torch.__version__ = type(torch.__version__)("2.0.0")
    if rank == 1 and what == "environment":
        torch.set_float32_matmul_precision("high")
    sys.exit(call(folder, *(argument.replace("FOLDER", str(folder)) for argument in arguments)))


OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "config": ((), ("--config", "FOLDER/other.py")),
    "--set": ((), ("train.steps=2",)),
    "seed": ((), ("train.seed=7",)),
    "data file": ((), ("data.path=FOLDER/other.txt",)),
    "checkpoint": (
        ("train.steps=2", "--resume", "FOLDER/one/checkpoints/step_000001"),
        ("train.steps=2", "--resume", "FOLDER/two/checkpoints/step_000001"),
    ),
}
NAMED = {
    "config": "optimizer.lr: the ranks were started with different values: ",
    "--set": "train.steps: the ranks were started with different values: 1 on rank 0, 2 on rank 1.",
    "seed": "train.seed: the ranks were started with different values: 0 on rank 0, 7 on rank 1.",
    "data file": "data.path, digest: the ranks were started with different values: ",
    "world size": "world size: the ranks were started with different values: 2 on rank 0, 3 on rank 1.",
    "package": f"torch: the ranks were started with different values: '{torch.__version__}' on rank 0, '2.0.0' on",
    "environment": "float32 matmul precision: the ranks were started with different values: 'highest' on rank 0,",
    "checkpoint": "--resume: the ranks were started with different values: ",
}


@pytest.mark.parametrize(
    "what", [what if what in ("seed",) else pytest.param(what, marks=pytest.mark.slow) for what in NAMED]
)
def test_ranks_that_were_started_differently_are_refused_by_what_differs(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_inputs(tmp_path)
    if what == "checkpoint":
        monkeypatch.setenv("COLONNADE_CACHE", str(tmp_path / "cache"))
        for name, rate in (("one", 0.001), ("two", 0.5)):
            assert call(tmp_path, f"output.dir={tmp_path / name}", f"optimizer.lr={rate}") == 0
    program: Program = partial(started_differently, what, tmp_path)
    ends = play(program, 2)
    print(ends[0].errors)
    assert [end.code for end in ends] == [2, 2], ends
    assert NAMED[what] in ends[0].errors
    assert not (tmp_path / "run").exists()
    shutil.rmtree(tmp_path)

"""The best checkpoint is kept, and a run ends early, by validation losses that are written down here."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

import training.loop
from parallel.checkpoint import checkpoint
from parallel.config import parse
from parallel.engine.context import Place, make_context
from parallel.engine.engine import Engine
from parallel.errors import CheckpointError, ConfigError
from tests.harness import run
from tests.test_loop import ALONE, TINY, lines_of
from tests.test_loop import prepared as prepared_on_any_data
from training.best_loss import BestLoss
from training.config import read_config
from training.preflight import Job
from training.run import run_job

EACH = ("output.eval_every=1", "output.export=False", "data.validation_fraction=0.05")
STOPPING = "train.early_stopping=dict(patience=2)"


def prepared(folder: Path, *assignments: str, resume: str | None = None, place: Place = ALONE) -> Job:
    """Return a run on 60 samples, in a file beside its folder, which rank 0 writes."""
    if place.rank == 0:
        np.save(f"{folder}.npy", np.random.default_rng(0).integers(4, 260, 960, dtype=np.int32))
    if place.world_size > 1:
        dist.barrier()
    return prepared_on_any_data(folder, f"data.path={folder}.npy", *assignments, resume=resume, place=place)


def scripted(patch: pytest.MonkeyPatch, losses: Iterable[float]) -> None:
    """Have the evaluation after step k return losses[k - 1]."""
    by_step = list(losses)
    patch.setattr(Engine, "evaluate", lambda engine, batches: by_step[engine.num_steps - 1])


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))


def pointers(folder: Path) -> tuple[str, ...]:
    """Return what the files `best` and `latest` say."""
    return tuple((folder / "checkpoints" / name).read_text().strip()[-1] for name in ("best", "latest"))


# -- the best checkpoint -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "options", "steps", "best_and_latest"),
    [
        ([5, 3, 4, 2, 6, 7], ("output.keep_checkpoints=1",), [4], ("4", "4")),
        ([5, 3, 4, 2, 6, 7], ("output.keep_checkpoints=1", "output.checkpoint_every=1"), [4, 6], ("4", "6")),
        ([1, 3, 4, 2, 6, 7], ("output.keep_checkpoints=2", "output.checkpoint_every=2"), [1, 4, 6], ("1", "6")),
        ([3, 3, math.nan, 3, 3, 3], ("output.checkpoint_every=2",), [1, 4, 6], ("1", "6")),
    ],
)
def test_the_checkpoint_of_the_lowest_loss_survives_whatever_is_saved_after_it(
    losses: list[float],
    options: tuple[str, ...],
    steps: list[int],
    best_and_latest: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scripted(monkeypatch, losses)
    run_job(prepared(tmp_path, *EACH, "output.keep_best=True", *options))
    assert kept(tmp_path) == steps
    assert pointers(tmp_path) == best_and_latest


def test_a_run_resumes_from_its_best_checkpoint_and_remembers_its_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*EACH, "output.keep_best=True", "output.checkpoint_every=1", "output.keep_checkpoints=1")
    scripted(monkeypatch, [5, 2, 4, 4, 4, 4])
    run_job(prepared(tmp_path, *options, "train.steps=4"))
    shown = " ".join(capsys.readouterr().out.split())
    assert "validation loss 4.0000 its lowest 2.0000 after step 2 " in shown
    assert "best checkpoint " in shown
    for name, step in (("best", 2), ("latest", 4)):
        job = prepared(tmp_path, *options, resume=f"{tmp_path}/checkpoints/{name}")
        assert job.resume_from == tmp_path / "checkpoints" / f"step_{step:06d}"
    scripted(monkeypatch, [0, 0, 0, 0, 3, 1.5])
    run_job(prepared(tmp_path, *options, "train.steps=5", resume="auto"))
    assert (kept(tmp_path), pointers(tmp_path)) == ([2, 5], ("2", "5"))  # 3 is less than 4, but not than 2
    run_job(prepared(tmp_path, *options, resume="auto"))
    assert (kept(tmp_path), pointers(tmp_path)) == ([6], ("6", "6"))


def test_the_best_checkpoint_of_a_branch_that_was_left_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4 was the best, and then the run went on from step 3 with other settings: there the best is step 2."""
    options = (*EACH, "output.keep_best=True", "output.checkpoint_every=1", "output.keep_checkpoints=3")
    scripted(monkeypatch, [5, 2, 4, 1, 4, 4])
    run_job(prepared(tmp_path, *options, "train.steps=4"))
    assert pointers(tmp_path) == ("4", "4")
    scripted(monkeypatch, [0, 0, 0, 3, 3, 3])
    run_job(prepared(tmp_path, *options, resume=f"{tmp_path}/checkpoints/step_000003"))
    assert (kept(tmp_path), pointers(tmp_path)) == ([2, 4, 5, 6], ("2", "6"))


def test_files_that_name_no_checkpoint_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    best = tmp_path / "checkpoints" / "best"
    for content in (b"step_000009\n", b"../..", b"\xff\xfe"):
        best.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"--resume: {best} names no checkpoint\."):
            prepared(tmp_path / "new", resume=str(best))
        assert checkpoint.best_checkpoint(tmp_path) is None


def test_without_a_validation_loss_both_keys_are_refused_with_values_that_work(tmp_path: Path) -> None:
    keys = ("output.keep_best=True", STOPPING)
    with pytest.raises(ConfigError) as caught:
        read_config(None, [*TINY, *keys, "data.validation_fraction=0"], 1)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        *2 * ["output.keep_best"],
        *2 * ["train.early_stopping"],
    ]
    assert "it needs output.eval_every, which is 0. Try output.eval_every=50" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        prepared(tmp_path, *keys, "output.eval_every=1", "data.validation_fraction=0.001")
    first, second = caught.value.problems
    assert first.startswith("output.keep_best: it needs validation samples, and data.validation_fraction 0.001 of ")
    fraction = first.partition("Try ")[2].partition(",")[0]
    assert second.startswith("train.early_stopping: ")
    assert prepared(tmp_path, *keys, "output.eval_every=1", fraction).corpus.num_validation > 0


# -- ending early ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "last"),
    [([5, 4, 4, 4, 1, 1], 4), ([5, 6, 4, 5, 3, 4], 6), ([math.nan] * 6, 2), ([1, 2, math.nan, 0, 0, 0], 3)],
)
def test_a_run_ends_after_evaluations_in_a_row_without_a_new_lowest_loss(
    losses: list[float],
    last: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scripted(monkeypatch, losses)
    run_job(prepared(tmp_path, *EACH, STOPPING, "output.export=True"))
    assert [line["step"] for line in lines_of(tmp_path)] == list(range(1, last + 1))
    assert (tmp_path / "export" / "model.safetensors").exists()
    assert ("train.early_stopping: the run ends, since 2 evaluations in a row" in capsys.readouterr().out) is (last < 6)


def test_the_evaluations_before_a_resume_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose count begins anew at each resume would never end. With more patience it goes on."""
    options = (*EACH, STOPPING, "output.checkpoint_every=1")
    scripted(monkeypatch, [1, 2, 2, 2, 2, 2])
    run_job(prepared(tmp_path, *options, "train.steps=2"))
    run_job(prepared(tmp_path, *options, resume="auto"))
    assert len(lines_of(tmp_path)) == 3
    run_job(prepared(tmp_path, *options, resume="auto"))
    assert len(lines_of(tmp_path)) == 3
    run_job(prepared(tmp_path, *options, "train.early_stopping=dict(patience=3)", resume="auto"))
    assert len(lines_of(tmp_path)) == 4


def train_in_two(rank: int, world_size: int, folder: Path) -> tuple[int, str]:
    """Return the step after which a run of two stages ends, and the best checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        scripted(patch, [5, 4, 6, 6, 1, 1])
        place = Place(rank, world_size, rank, ALONE.local_world_size)
        options = (*EACH, STOPPING, "output.keep_best=True", "output.export=True", "parallel.pipeline=2")
        job = prepared(folder, *options, place=place)
        dist.barrier()  # every rank is connected before any of them writes
        steps: list[int] = []
        evaluate = training.loop.ends_early

        def watched(config: Any, best: BestLoss) -> bool:
            steps.append(best.step)
            return evaluate(config, best)

        patch.setattr(training.loop, "ends_early", watched)
        run_job(job)
    return len(steps), (folder / "checkpoints" / "best").read_text()


def test_every_rank_ends_after_the_same_step(tmp_path: Path) -> None:
    assert run(train_in_two, 2, tmp_path) == [(5, "step_000002\n")] * 2  # asked before steps 1 to 5, and ended there


def test_a_loss_comes_back_from_a_checkpoint_as_it_was() -> None:
    best = BestLoss()
    assert BestLoss.restored(best.state()) == best
    assert [best.take(step, loss) for step, loss in ((1, math.nan), (2, 3.0), (3, 3.0), (4, 2.5))] == [
        False,
        True,
        False,
        True,
    ]
    assert best == BestLoss.restored(best.state()) == BestLoss(2.5, 4, 0)
    assert BestLoss.restored(None) == BestLoss()


@pytest.mark.parametrize(("best", "named"), [(1, ["1", "1", "1"]), (2, ["", "", "2"])])
def test_best_names_a_whole_checkpoint_also_while_one_is_replaced(
    best: int, named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that resumed from step 1 takes step 2 again. It could be killed while there is none, or before `best` is
    written: at each renaming of a folder, and at the end, the file names a checkpoint that is there, or is not there.
    """
    axis, seen = make_context(parse(dict(data=dict(sequence_length=4)), world_size=1), ALONE).mesh.world, []

    def save(step: int, best: int) -> None:
        folder, best_folder = (checkpoint.step_folder(tmp_path, number) for number in (step, best))
        checkpoint.save(folder, [], metadata={}, axis=axis, keep=3, best=best_folder)

    def look() -> None:
        pointer = tmp_path / "checkpoints" / "best"
        assert pointer.exists() == (checkpoint.best_checkpoint(tmp_path) is not None)
        seen.append(pointer.read_text().strip()[-1] if pointer.exists() else "")

    def rename(old: Path, new: Path) -> None:
        os.rename(old, new)
        look()

    save(1, 1)
    save(2, 2)
    monkeypatch.setattr(Path, "rename", rename)
    save(2, best)
    look()
    assert seen == named

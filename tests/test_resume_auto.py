"""`--resume auto` goes on from the newest whole checkpoint, says which it passed over, and never begins anew."""

import copy
import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from models.saved_model import SavedModel
from parallel.checkpoint import verify as verification
from parallel.checkpoint.index import Index
from parallel.errors import CheckpointError, ConfigError
from tests.checkpoints import seal
from tests.harness import run
from tests.test_damage import STRANGE, leaves
from tests.test_loop import ALONE, lines_of, prepared
from training.preflight import Inputs, Job
from training.resume import find_start
from training.run import run_job

OPTIONS = ("train.steps=4", "output.checkpoint_every=1", "output.keep_checkpoints=9", "output.export=False")
SHARD = "rank_00000.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that has saved a checkpoint after each of its four steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_job(prepared(folder, *OPTIONS))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of this run."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def step(folder: Path, number: int) -> Path:
    return folder / "checkpoints" / f"step_{number:06d}"


def flip(file: Path, place: int = -8) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


def resumed(folder: Path, *assignments: str, resume: str = "auto") -> Job:
    return prepared(folder, *OPTIONS, *assignments, resume=resume)


def content_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below a folder."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): sha256(file.read_bytes()).hexdigest() for file in files}


def said_to(act: Callable[[], object]) -> str:
    """Return what a refusal says; an empty text where there is none."""
    try:
        act()
    except CheckpointError as error:
        return str(error)
    return ""


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit": (lambda x: flip(x / SHARD), f"{SHARD} is damaged, or another file"),
    "a truncated shard": (lambda x: (x / SHARD).write_bytes((x / SHARD).read_bytes()[:-9]), f"{SHARD} is damaged: it"),
    "no shard": (lambda x: (x / SHARD).unlink(), f"{SHARD} is missing"),
    "a shard of the step before": (
        lambda x: shutil.copyfile(step(x.parents[1], int(x.name[-1]) - 1) / SHARD, x / SHARD),
        f"{SHARD} is damaged, or another file",
    ),
    "no index": (lambda x: (x / "checkpoint.json").unlink(), "checkpoint.json does not exist"),
    "an altered index": (lambda x: flip(x / "checkpoint.json", 200), "checkpoint.json is damaged, or another file"),
    "no checksums": (lambda x: (x / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_checkpoint_is_taken_and_the_damaged_ones_are_named(
    folder: Path, whole: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The position in the data, the steps and the messages are those of the one that was taken."""
    change, words = DAMAGES[damage]
    for number in (4, 3):
        change(step(folder, number))
    run_job(resumed(folder))
    shown = " ".join(capsys.readouterr().out.split())
    for number in (4, 3):
        assert f"passed over step_{number:06d}: {words}" in shown
    assert f"resuming from {step(folder, 2)}" in shown
    assert lines_of(folder) == lines_of(whole)  # those of steps 3 and 4 were taken again
    log = (folder / "logs" / "rank_0.log").read_text()
    assert f"passed over step_000004: {words}" in log
    assert f"resumed after step 2, sample 16, from {step(folder, 2)}" in log


def test_a_checkpoint_that_was_verified_is_read_no_second_time_to_verify_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    hash_of = verification._sha256_of

    def counted(file: BinaryIO) -> str:
        hashed.append(file.fileno())
        return hash_of(file)

    monkeypatch.setattr(verification, "_sha256_of", counted)
    flip(step(folder, 4) / SHARD)
    run_job(resumed(folder))
    assert len(hashed) == 2  # the shard of step 4, and that of step 3


def test_the_steps_of_epochs_follow_from_the_checkpoint_that_is_taken(folder: Path, tmp_path: Path) -> None:
    """24 of the samples were taken after step 3: with batches of 4 the rest is more steps than after step 4."""
    epochs = ("train.steps=None", "train.epochs=0.01", "train.global_batch_size=4")
    shutil.copytree(folder, tmp_path / "other")
    shutil.rmtree(step(tmp_path / "other", 4))
    flip(step(folder, 4) / SHARD)
    jobs = [resumed(tmp_path / name, *epochs) for name in ("run", "other")]
    assert jobs[0].config.train.steps != jobs[1].config.train.steps
    damaged = jobs[0].inputs.without_damaged(CheckpointError("damaged"))
    assert damaged.config.train == jobs[1].config.train
    assert damaged.messages[0] == "passed over step_000004: damaged"
    assert [x for x in damaged.messages[2:] if str(tmp_path) not in x] == [
        x for x in jobs[1].messages[1:] if str(tmp_path) not in x
    ]


def test_where_none_is_whole_auto_refuses_by_name_and_touches_nothing(folder: Path) -> None:
    """A run from the beginning would delete or rename what could still be repaired."""
    for number in (1, 2, 3, 4):
        flip(step(folder, number) / SHARD)
    (step(folder, 2) / SHARD).unlink()
    before = content_of(folder.parent)
    said = said_to(lambda: run_job(resumed(folder)))
    assert said.startswith(f"--resume auto: none of the checkpoints in {folder}/checkpoints is whole: step_000004: ")
    assert all(f"step_{number:06d}: {SHARD} is " in said for number in (1, 2, 3, 4))
    assert content_of(folder.parent) == before


def test_where_all_files_are_gone_auto_refuses_too(folder: Path) -> None:
    for number in (1, 2, 3, 4):
        (step(folder, number) / SHARD).unlink()
    assert f"step_000001: {SHARD} is missing" in said_to(lambda: resumed(folder))
    (folder / "checkpoints" / "latest").unlink()
    assert f"step_000001: {SHARD} is missing" in said_to(lambda: resumed(folder))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_that_was_named_is_refused_with_the_one_before_and_nothing_is_touched(
    folder: Path, damage: str
) -> None:
    """The run's config.json had been rewritten by then, or an earlier run renamed."""
    change, words = DAMAGES[damage]
    change(step(folder, 4))
    if damage in ("no index", "no checksums"):  # of which the first is no checkpoint any more
        words = ""
    before = content_of(folder.parent)
    other = folder.parent / "other"
    shutil.copytree(folder, other)
    for target in (folder, other):  # to go on in the run's folder, and to begin in that of another run
        with pytest.raises(CheckpointError) as refused:
            run_job(resumed(target, "optimizer.lr=0.5", resume=str(step(folder, 4))))
        assert words in str(refused.value)
        assert damage == "no index" or str(refused.value).endswith(f"Try --resume {step(folder, 3)}.")
    assert {name: x for name, x in content_of(folder.parent).items() if name.startswith("run")} == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["other", "run"]


@pytest.mark.parametrize("content", [None, "", "step_999999\n", "../../step_000001", "\0" * 50, "x" * 10**6])
def test_latest_that_names_no_checkpoint_gives_the_newest_one(folder: Path, content: str | None) -> None:
    latest = folder / "checkpoints" / "latest"
    latest.unlink()
    if content is not None:
        latest.write_text(content)
    assert resumed(folder).resume_from == step(folder, 4)


def test_of_a_run_that_was_resumed_from_an_earlier_step_the_later_ones_come_last(folder: Path) -> None:
    (folder / "checkpoints" / "latest").write_text("step_000002\n")
    assert resumed(folder).resume_from == step(folder, 2)
    (step(folder, 2) / SHARD).unlink()
    assert resumed(folder).resume_from == step(folder, 1)
    (step(folder, 1) / SHARD).unlink()
    assert resumed(folder).resume_from == step(folder, 4)


def test_a_checkpoint_that_another_one_of_its_step_was_about_to_replace_is_found(folder: Path) -> None:
    """A save that was killed between its two renamings leaves the only checkpoint under a name with a dot."""
    for number in (1, 2, 3):
        shutil.rmtree(step(folder, number))
    aside = folder / "checkpoints" / ".step_000004.replaced"
    step(folder, 4).rename(aside)
    (folder / "checkpoints" / ".step_000004.incomplete").mkdir()
    job = resumed(folder, "train.steps=5")
    assert job.resume_from == aside
    run_job(job)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", "step_000005"]


def test_a_whole_checkpoint_is_not_deleted_for_a_damaged_one_that_was_passed_over(folder: Path) -> None:
    """Two are kept: of steps 2, 4 and 5 these were once the damaged one and the newest."""
    for number in (1, 3):
        shutil.rmtree(step(folder, number))
    flip(step(folder, 4) / SHARD)
    run_job(resumed(folder, "train.steps=5", "output.checkpoint_every=5", "output.keep_checkpoints=2"))
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["latest", "step_000002", "step_000005"]


def test_what_was_passed_over_is_kept_until_a_new_checkpoint_is_complete(folder: Path) -> None:
    flip(step(folder, 4) / SHARD)
    run_job(resumed(folder, "output.checkpoint_every=0"))
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [".step_000004.damaged", "latest", "step_000001", "step_000002", "step_000003"]
    assert resumed(folder).resume_from == step(folder, 3)


@pytest.mark.parametrize("name", ["read", "open"])
def test_a_checkpoint_that_could_not_be_read_this_time_is_never_deleted(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be whole, as when a network disk is gone for a moment. The next save deleted it."""
    sha256_of, open_file, failed = verification._sha256_of, os.open, []
    target = step(folder, 4) / (SHARD if name == "read" else "checkpoint.json")
    before = {file.name: file.read_bytes() for file in step(folder, 4).iterdir()}

    def reading(file: BinaryIO) -> str:
        if name == "read" and os.fstat(file.fileno()).st_ino == target.stat().st_ino:
            failed.append(target)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256_of(file)

    def opening(path: Any, *arguments: Any, **options: Any) -> int:
        if name == "open" and str(path) == str(target):
            failed.append(target)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return open_file(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(verification, "_sha256_of", reading)
        patch.setattr(os, "open", opening)
        job = resumed(folder, "train.steps=5")
        run_job(job)
    assert failed
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert [name for name in names if "4" in name] == ["step_000004", "step_000004.unreadable"]
    kept = folder / "checkpoints" / "step_000004.unreadable"
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == before


def test_a_checkpoint_of_another_program_is_refused_before_the_run(folder: Path) -> None:
    """Its checksums are right: somebody has written it on purpose."""
    index = json.loads((step(folder, 4) / "checkpoint.json").read_text())
    changes: list[dict[str, Any]] = [
        dict(counters="x"),
        dict(counters={}),
        dict(config=[]),
        dict(best=3),
        dict(model=4),
    ]
    for change in changes:
        changed: dict[str, Any] = index | dict(metadata=index["metadata"] | change)
        (step(folder, 4) / "checkpoint.json").write_text(json.dumps(changed))
        seal(step(folder, 4))
        with pytest.raises(CheckpointError, match=r"is no(t a)? checkpoint of this program"):
            resumed(folder)


@pytest.mark.slow
def test_a_strange_value_anywhere_in_the_metadata_is_refused_or_read_but_never_breaks_down(folder: Path) -> None:
    inputs, newest = resumed(folder).inputs, step(folder, 4)
    whole, draw, refused = json.loads((newest / "checkpoint.json").read_text()), random.Random(4), 0
    for _ in range(300):
        index = copy.deepcopy(whole)
        container, key = draw.choice(list(leaves(index["metadata"])))
        container[key] = draw.choice(STRANGE)
        (newest / "checkpoint.json").write_text(json.dumps(index))
        seal(newest)
        try:
            Inputs.of(inputs.request, inputs.corpus, find_start(inputs.config, str(newest)))
            SavedModel.of(Index.read(newest))
        except (CheckpointError, ConfigError):  # the second is of the steps that a changed config would take
            refused += 1
    assert refused > 100


def resume_on_two(rank: int, world_size: int, folder: Path) -> str:
    """Return what is said on this rank to a run of two ranks, whose files of both ranks are damaged."""
    from parallel.engine.context import Place

    place = Place(rank, world_size, rank, world_size)
    options = (*OPTIONS, "train.micro_batch_size=2")
    if rank == 0:
        assert ALONE.world_size == 1
    run_job(prepared(folder, *options, place=place))
    if rank == 0:
        flip(step(folder, 4) / "rank_00001.safetensors")
        flip(step(folder, 3) / SHARD)
    job = prepared(folder, *options, resume="auto", place=place)
    run_job(job)
    try:
        for number in (1, 2):
            flip(step(folder, number) / SHARD) if rank == 0 else None
        run_job(prepared(folder, *options, "train.steps=5", resume=str(step(folder, 2)), place=place))
    except CheckpointError as error:
        return str(error)
    return "no error"


@pytest.mark.slow
def test_all_ranks_take_the_same_checkpoint_and_refuse_for_the_same_reason(tmp_path: Path) -> None:
    first, second = run(resume_on_two, 2, tmp_path / "run")
    assert first == second
    assert f"{step(tmp_path / 'run', 2) / SHARD} is damaged, or another file" in first
    for rank in (0, 1):
        log = (tmp_path / "run" / "logs" / f"rank_{rank}.log").read_text()
        assert "passed over step_000004: rank_00001.safetensors is damaged" in log
        assert "passed over step_000003: rank_00000.safetensors is damaged" in log
        assert "resumed after step 2, sample 16" in log

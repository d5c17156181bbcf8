"""A resumed run goes on at the sample where it stopped, or is refused: each row of the table in docs/data.md."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.data import Batch, Loader, SampleOrder
from parallel.errors import CheckpointError
from tests.checkpoints import seal
from tests.tables import rows
from tests.test_loop import lines_of, prepared
from training.preflight import Job
from training.run import run_job

PAGE, HEADING = "docs/data.md", "Resuming"
SAVED_STEPS, BATCH = 3, 8
OPTIONS = (f"train.steps={SAVED_STEPS}", "output.checkpoint_every=3", "output.export=False")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "tokens.npy"
    np.save(file, np.random.default_rng(0).integers(4, 260, 1000, dtype=np.int32))
    return file


@pytest.fixture(scope="module")
def saved(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of three steps, on 62 samples of 16 tokens."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_job(prepared(folder, *OPTIONS, f"data.path={corpus}"))
    return folder


@pytest.fixture
def go_on(saved: Path, corpus: Path, tmp_path: Path) -> Callable[..., Job]:
    """Return a function that prepares a run which resumes the saved one, with other assignments."""

    def prepare(*assignments: str) -> Job:
        return prepared(tmp_path / "on", *OPTIONS, f"data.path={corpus}", *assignments, resume=str(saved))

    return prepare


def watched(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """Return a list in which every training batch will be."""
    taken: list[Batch] = []
    training = Loader.training

    def watch(loader: Loader, first: int) -> Batch:
        taken.append(training(loader, first))
        return taken[-1]

    monkeypatch.setattr(Loader, "training", watch)
    return taken


def check_batch_size(go_on: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, corpus: Path, **_: Any) -> str:
    """A run of batches of 8 that went on with batches of 4 once took samples 12 to 15 again, with their dropout masks.

    It resumes twice: the position after a change is no product of a step and a batch size.
    """
    job = go_on("train.global_batch_size=4", "train.steps=6")
    taken = watched(monkeypatch)
    run_job(job)
    folder = job.folder.path
    later = prepared(folder, *OPTIONS, f"data.path={corpus}", "train.steps=12", resume="auto")
    assert "goes on at sample 36" in " ".join(later.messages)
    run_job(later)
    firsts, tokens = [24, 28, 32, *range(36, 84, 8)], np.load(corpus)
    order = SampleOrder(62, shuffle=True, seed=0).take(0, 84)
    for first, batch in zip(firsts, taken, strict=True):
        places = batch["sample_ids"].tolist()
        assert places == list(range(first, first + len(places)))
        assert batch["input_ids"].tolist() == [tokens[16 * order[p] :][:16].tolist() for p in places]
    assert [line["tokens"] for line in lines_of(folder)] == [16 * n for n in (28, 32, 36, *range(44, 92, 8))]
    return "\n".join(job.messages)


def check_layout(go_on: Callable[..., Job], **_: Any) -> str:
    """Another layout needs other ranks: `test_a_run_resumes_in_another_layout` of test_loop.py trains in some."""
    return "\n".join(go_on("train.micro_batch_size=8").messages)


def check_steps(go_on: Callable[..., Job], **_: Any) -> str:
    job = go_on("train.steps=9")
    run_job(job)
    (last,) = (line for line in lines_of(job.folder.path) if line["step"] == 9)
    # Warm-up of 2 steps, then a cosine over the 7 others, of which 6 were taken: to min_ratio 0.1 of lr 6e-4.
    assert last["lr"] == pytest.approx(6e-4 * (0.1 + 0.9 * (1 + np.cos(np.pi * 6 / 7)) / 2))
    return "\n".join(job.messages)


def check_epochs(go_on: Callable[..., Job], **_: Any) -> str:
    """24 of 62 samples are taken: the others are 5 steps of 8. test_length.py goes on with batches of another size."""
    job = go_on("train.steps=None", "train.epochs=1")
    assert job.config.train.steps == 8
    return "\n".join(job.messages)


def refused(*assignments: str) -> Callable[..., str]:
    def check(go_on: Callable[..., Job], **_: Any) -> str:
        with pytest.raises(CheckpointError) as refusal:
            go_on(*assignments)
        return str(refusal.value)

    return check


def with_tokens(change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Callable[..., str]:
    def check(go_on: Callable[..., Job], corpus: Path, tmp_path: Path, **_: Any) -> str:
        np.save(tmp_path / "other.npy", change(np.load(corpus)))
        words = refused(f"data.path={tmp_path}/other.npy")(go_on)
        assert "begin a new run: model.path=" in words
        assert not (tmp_path / "on").exists()
        return words

    return check


def last_one_changed(tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.append(tokens[:-1], 4 + (tokens[-1] - 3) % 256)


def check_other_validation(go_on: Callable[..., Job], corpus: Path, tmp_path: Path, **_: Any) -> str:
    """A run that is validated on data of its own goes on with the same ones, wherever they are, and with no others."""
    others = [tmp_path / f"{name}.npy" for name in ("own", "moved", "changed")]
    for file in others:
        np.save(file, np.load(corpus)[:100][:: -1 if file.stem == "changed" else 1])
    with_own = [*OPTIONS, f"data.path={corpus}"]
    run_job(prepared(tmp_path / "own", *with_own, f"data.validation_path={others[0]}"))

    def resumed(*assignments: str) -> Job:
        return prepared(tmp_path / "on", *with_own, *assignments, resume=str(tmp_path / "own"))

    assert resumed(f"data.validation_path={others[1]}", "data.validation_fraction=0.1").resume_from is not None
    words = refused(f"data.validation_path={others[2]}")(resumed)
    assert f"data.validation_path: {others[2]} has other tokens" in words
    assert "validated on data of their own; name these as data.validation_path" in refused()(resumed)
    return refused(f"data.validation_path={corpus}")(go_on)


def check_other_key(go_on: Callable[..., Job], corpus: Path, tmp_path: Path, **_: Any) -> str:
    """The same tokens in another dtype and elsewhere are the same corpus."""
    np.save(tmp_path / "moved.npy", np.load(corpus).astype(np.uint16))
    messages = "\n".join(go_on(f"data.path={tmp_path}/moved.npy", "optimizer.lr=0.5").messages)
    assert "optimizer.lr is 0.5, was 0.0006" in messages
    assert f"data.path is {tmp_path}/moved.npy" in messages
    return messages


def check_older(go_on: Callable[..., Job], saved: Path, tmp_path: Path, **_: Any) -> str:
    index = saved / "checkpoints" / "step_000003" / "checkpoint.json"
    text = index.read_text()
    content = json.loads(text)
    del content["metadata"]["corpus"], content["metadata"]["counters"]["samples"]
    index.write_text(json.dumps(content))
    seal(index.parent)
    try:
        messages = "\n".join(go_on("train.global_batch_size=4").messages)
        with pytest.raises(CheckpointError, match=r"set train\.seed=0"):
            go_on("train.seed=1")
    finally:
        index.write_text(text)
        seal(index.parent)
    assert "goes on at sample 24" in messages
    return messages


def check_documents(go_on: Callable[..., Job], **_: Any) -> str:
    """The tokens are the same: nothing is said of another corpus."""
    words = refused("data.document_mask=True")(go_on)
    assert "has other tokens" not in words
    return words


def check_end_of_documents(corpus: Path, tmp_path: Path, **_: Any) -> str:
    """Labels are others then, and so may be the samples that have one, though no token has changed."""
    with_documents = [*OPTIONS, f"data.path={corpus}", "data.document_mask=True"]
    own, other = (prepared(tmp_path / "own", *with_documents, f"model.eos_token_id={end}") for end in (4, 5))
    assert own.corpus.digest != other.corpus.digest
    run_job(own)

    def resumed(*assignments: str) -> Job:
        return prepared(tmp_path / "on", *with_documents, *assignments, resume=str(tmp_path / "own"))

    assert resumed("model.eos_token_id=4").resume_from is not None
    return refused("model.eos_token_id=5")(resumed)


CHECKS: dict[str, Callable[..., str]] = {
    "the layout": check_layout,
    "`train.global_batch_size`": check_batch_size,
    "`train.steps`": check_steps,
    "`train.epochs`": check_epochs,
    "`train.seed`": refused("train.seed=5"),
    "`data.sequence_length`": refused("data.sequence_length=8"),
    "`data.shuffle`": refused("data.shuffle=False"),
    "`data.validation_fraction`": refused("data.validation_fraction=0.1"),
    "`data.document_mask`": check_documents,
    "with `data.document_mask`, the token that ends a document of token ids": check_end_of_documents,
    "a corpus of another length, also a longer one": with_tokens(lambda tokens: np.append(tokens, 4)),
    "a corpus of the same length with other tokens, also of `data.validation_path`": with_tokens(last_one_changed),
    "data for validation of their own, or none any more": check_other_validation,
    "the path of the same corpus, or any other key": check_other_key,
    "nothing, and the checkpoint is of version 0.1.0": check_older,
}


@pytest.mark.parametrize("row", rows(PAGE, HEADING), ids=str)
def test_a_resumed_run_does_what_the_table_says(
    row: Any, go_on: Callable[..., Job], saved: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = CHECKS[row.what](go_on=go_on, saved=saved, corpus=corpus, tmp_path=tmp_path, monkeypatch=monkeypatch)
    for words in row.answer.split("`")[1::2]:
        assert words in said


def test_every_check_has_a_row() -> None:
    assert [row.what for row in rows(PAGE, HEADING)] == list(CHECKS)


def test_all_problems_of_a_resume_are_named_at_once(go_on: Callable[..., Job]) -> None:
    words = refused("train.seed=5", "data.shuffle=False", "data.sequence_length=8")(go_on)
    assert all(f"set {fix}" in words for fix in ("train.seed=0", "data.shuffle=True", "data.sequence_length=16"))

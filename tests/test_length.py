"""The length of a run, in steps, samples and epochs."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import launch
import parallel
from models.data import Corpus, SampleOrder
from models.data.corpus import corpus_of
from models.data.samples import TokenRow
from models.shapes import resolve
from parallel.config import Config, apply_overrides, load_raw, parse
from parallel.errors import ConfigError
from tests.test_loop import lines_of, prepared
from tests.test_resumed_runs import watched
from training.length import RunPosition, with_steps
from training.run import run_job

NUM_TRAINING, LENGTH = 62, 16


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of 62 samples of 16 tokens, all different."""
    file = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    np.save(file, np.random.default_rng(0).integers(4, 260, NUM_TRAINING * LENGTH, dtype=np.int32))
    return file


def options(tokens: Path) -> tuple[str, ...]:
    return (f"data.path={tokens}", "data.validation_fraction=0", "output.export=False", "train.steps=None")


def corpus(num_samples: int) -> Corpus:
    return corpus_of(TokenRow(np.zeros(num_samples * 2, np.int32), 2), 2)


def config(**train: object) -> Config:
    return parse({"train": {"micro_batch_size": 1, **train}})


@pytest.mark.parametrize("epochs", [0.5, 1, 1.5, 3])
@pytest.mark.parametrize("batch", [1, 8, 62, 200])
def test_the_fewest_steps_that_take_each_sample_as_often_as_the_epochs_say(epochs: float, batch: int) -> None:
    steps = with_steps(config(epochs=epochs, global_batch_size=batch), corpus(NUM_TRAINING), RunPosition()).train.steps
    order = SampleOrder(NUM_TRAINING, shuffle=True, seed=3)
    times_taken = Counter(order.take(0, steps * batch).tolist())
    for number in range(NUM_TRAINING):
        assert times_taken[number] >= int(epochs)
    assert sum(times_taken.values()) >= epochs * NUM_TRAINING
    assert (steps - 1) * batch < epochs * NUM_TRAINING


def test_epochs_are_the_decimal_number_that_was_written() -> None:
    """0.1 × 30 is a little more than 3 in binary, and once was a step more."""
    assert with_steps(config(epochs=0.1, global_batch_size=1), corpus(30), RunPosition()).train.steps == 3
    assert with_steps(config(epochs=1e-6, global_batch_size=16), corpus(30), RunPosition()).train.steps == 1


def test_a_run_of_epochs_that_goes_on_with_another_batch_size_takes_the_samples_that_are_left(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps of 8 take 24 of 62 samples; the other 38 are ten steps of 4. By epochs alone it would be 16 steps."""
    first = prepared(tmp_path / "run", *options(tokens), "train.epochs=1", "output.checkpoint_every=3")
    assert first.config.train.steps == 8
    run_job(first)
    step_3 = str(tmp_path / "run/checkpoints/step_000003")
    job = prepared(tmp_path / "on", *options(tokens), "train.epochs=1", "train.global_batch_size=4", resume=step_3)
    assert job.config.train.steps == 3 + 10
    words = "\n".join(job.messages)
    assert "10 steps of 4 follow the 3 taken: 1.03 epochs, 1,024 tokens" in words
    assert "the learning rate follows the updates: 3 of the schedule's 13 are done" in words
    taken = watched(monkeypatch)
    run_job(job)
    places = [place for batch in taken for place in batch["sample_ids"].tolist()]
    assert places == list(range(24, 64))
    assert lines_of(tmp_path / "on")[-1]["epoch"] == 64 / 62
    same = prepared(tmp_path / "same", *options(tokens), "train.epochs=1", resume=step_3)
    assert same.config.train.steps == 8
    longer = prepared(tmp_path / "longer", *options(tokens), "train.epochs=2", resume=step_3)
    assert longer.config.train.steps == 16
    assert "train.epochs is 2.0, was 1.0" in "\n".join(longer.messages)
    shorter = prepared(tmp_path / "shorter", *options(tokens), "train.epochs=0.1", resume=step_3)
    assert shorter.config.train.steps == 3


def test_steps_and_epochs_are_one_length_and_either_replaces_the_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"train": {"steps": 20, "epochs": 2}})
    assert caught.value.problems == (
        "train.epochs: 2 and train.steps 20 are two lengths of one run. Try train.steps=None or train.epochs=None.",
    )
    assert parse(apply_overrides({"train": {"steps": 20}}, ["train.epochs=2", "train.steps=None"])).train.epochs == 2
    assert parse(apply_overrides({"train": {"epochs": 2}}, ["train.epochs=None", "train.steps=20"])).train.steps == 20


def test_the_config_json_of_a_run_of_epochs_has_no_steps_and_is_read_again(tokens: Path, tmp_path: Path) -> None:
    run_job(prepared(tmp_path, *options(tokens), "train.epochs=0.2"))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "steps" not in saved["train"]
    again = parse(load_raw(tmp_path / "config.json"), resolve=resolve)
    assert (again.train.epochs, again.to_dict()) == (0.2, saved)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_a_loop_of_the_users_own_is_refused_the_keys_of_a_run() -> None:
    raw = dict(train=dict(epochs=2, early_stopping={}), output=dict(eval_every=5))
    with pytest.raises(ConfigError) as caught:
        parallel.launch_from_torch(raw)
    epochs, stopping = caught.value.problems
    assert epochs.startswith("train.epochs: 2 is for colonnade train")
    assert "train.steps=epochs * len(loader)" in epochs
    assert stopping.startswith("train.early_stopping: ")


def test_a_check_and_a_run_say_how_many_samples_tokens_and_epochs_there_are(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three of 62 samples, 5%, are for validation. 4 steps of 8 samples of 16 tokens are 32/59 epochs."""
    sets = [f"data.path={tokens}", f"data.sequence_length={LENGTH}", "train.steps=4", "train.global_batch_size=8"]
    assert launch.main(launch.read_arguments(["--check", "--set", *sets, "output.eval_every=2"])) == 0
    shown = capsys.readouterr().out
    assert f"data: {tokens}\ntraining: 59 samples of 16 tokens; 4 steps of 8 are 0.54 epochs, 512 tokens\n" in shown
    assert "validation: 3 samples of 16 tokens, every 2 steps and after the last step\n" in shown
    run_job(prepared(tmp_path, f"data.path={tokens}", "data.validation_fraction=0.05", "train.steps=4"))
    shown = capsys.readouterr().out
    assert f"data: {tokens}\ntraining: 59 samples of 16 tokens; 4 steps of 8 are 0.54 epochs, 512 tokens\n" in shown
    assert re.search(r"samples +32, 0\.54 epochs", shown)

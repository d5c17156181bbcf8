"""Callbacks: what they are told, in which order, on which rank, and what becomes of a run when one fails."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import launch
from parallel.engine.context import Place
from parallel.errors import ConfigError
from tests.harness import run
from tests.tables import ROOT
from tests.test_loop import ALONE, TINY, Recorder, lines_of, prepared
from training.callbacks import Callback, CallbackError, Run
from training.config import read_config
from training.loggers import callbacks_of
from training.metrics import MetricsLine
from training.preflight import prepare
from training.run import run_job

SHORT = ("train.steps=4", "output.export=False")

MODULE = """
from training.callbacks import Callback

class Steps(Callback):
    def on_start(self, run):
        self.file = run.folder / "steps.txt"

    def on_step(self, line):
        with self.file.open("a") as file:
            print(line["step"], line["loss"], file=file)

class Later(Steps):
    def on_step(self, line):
        raise ZeroDivisionError("the reason")

class Other:
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a module of callbacks, whose name no other test uses."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine_of_test_callbacks.py").write_text(MODULE)
    yield tmp_path
    monkeypatch.delitem(sys.modules, "mine_of_test_callbacks", raising=False)


# -- what is called ----------------------------------------------------------------------------------------------------


def test_a_callback_is_told_of_all_that_happens_in_order(tmp_path: Path) -> None:
    recorder = Recorder()
    run_job(
        prepared(tmp_path, *SHORT, "output.eval_every=2", "output.checkpoint_every=2", "output.checkpoint_async=False"),
        callbacks=[recorder],
    )
    lines = lines_of(tmp_path)
    assert recorder.told == [
        ("start", 0),
        ("step", 1),
        ("step", 2),
        ("evaluate", 2, lines[1]["validation_loss"]),
        ("checkpoint", 2, "step_000002"),
        ("step", 3),
        ("step", 4),
        ("evaluate", 4, lines[3]["validation_loss"]),
        ("checkpoint", 4, "step_000004"),
        ("end", None),
    ]
    assert [line["loss"] for line in recorder.lines] == [line["loss"] for line in lines]
    again = Recorder()
    run_job(prepared(tmp_path, *SHORT, "train.steps=5", resume="auto"), callbacks=[again])
    assert [told[:2] for told in again.told] == [("start", 4), ("step", 5), ("evaluate", 5), ("end", None)]


def test_the_end_is_told_with_the_error_that_ended_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from parallel.engine.engine import Engine

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "train_step", interrupted)
    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt) as caught:
        run_job(prepared(tmp_path, *SHORT), callbacks=[recorder])
    assert recorder.told == [("start", 0), ("end", caught.value)]


class Ranks(Callback):
    """Writes a file for each rank on which it is called."""

    on_every_rank = True

    def on_start(self, run: Run) -> None:
        (run.folder / f"{type(self).__name__}_{run.rank}").touch()


class First(Ranks):
    on_every_rank = False


class FailsOn(Ranks):
    """Fails in one event of one rank."""

    def __init__(self, rank: int, event: str) -> None:
        self.rank, self.event = rank, event

    def _fail(self, event: str) -> None:
        if event == self.event and dist.get_rank() == self.rank:
            raise ZeroDivisionError("the reason")

    def on_step(self, line: MetricsLine) -> None:
        if line["step"] == 2:
            self._fail("on_step")

    def on_end(self, error: BaseException | None) -> None:
        self._fail("on_end")


def train_with(rank: int, world_size: int, folder: Path, callbacks: Callable[[], list[Callback]]) -> str:
    """Return the error that ends a run of two ranks with these callbacks, and what the first rank was told."""
    place = Place(rank, world_size, rank, ALONE.local_world_size)
    job = prepared(folder, *SHORT, place=place)
    dist.barrier()
    try:
        run_job(job, callbacks=callbacks())
    except CallbackError as error:
        return str(error)
    return ""


class Pops(Callback):
    """Takes a number out of the line, as a logger does that shows it in another way."""

    def on_step(self, line: MetricsLine) -> None:
        line.pop("validation_loss", None)


def test_what_a_callback_changes_in_a_line_nothing_else_sees(tmp_path: Path) -> None:
    """Rank 0 alone took an evaluation for none then, and the others waited for it to save the best checkpoint."""
    options = ("output.eval_every=1", "output.keep_best=True", "output.checkpoint_every=0")
    run_job(prepared(tmp_path, *SHORT, *options), callbacks=[Pops()])
    assert all(line["validation_loss"] > 0 for line in lines_of(tmp_path))
    assert (tmp_path / "checkpoints" / "best").exists()


def on_ranks() -> list[Callback]:
    return [Ranks(), First()]


def fails_on_0() -> list[Callback]:
    return [FailsOn(0, "on_step")]


def fails_on_1_at_the_end() -> list[Callback]:
    return [FailsOn(1, "on_end")]


def test_rank_0_alone_is_told_or_every_rank_where_the_class_says_so(tmp_path: Path) -> None:
    assert run(train_with, 2, tmp_path, on_ranks) == ["", ""]
    assert sorted(path.name for path in tmp_path.glob("*_[01]")) == ["First_0", "Ranks_0", "Ranks_1"]


@pytest.mark.parametrize(("callbacks", "where"), [(fails_on_0, "on_step"), (fails_on_1_at_the_end, "on_end")])
def test_what_a_callback_raises_on_one_rank_ends_the_run_on_all_by_name(
    callbacks: Callable[[], list[Callback]], where: str, tmp_path: Path
) -> None:
    for words in run(train_with, 2, tmp_path, callbacks):
        assert f"tests.test_callbacks:FailsOn failed in {where}: ZeroDivisionError: the reason (" in words
        assert f"{Path(__file__).name}:" in words
    assert len(lines_of(tmp_path)) == (2 if where == "on_step" else 4)


def test_the_callback_of_the_loggers_page_works_as_it_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, config = re.findall(r"```python\n(.*?)```", (ROOT / "docs/loggers.md").read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "small.py").write_text(config)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    sets = [*TINY, *SHORT, f"output.dir={tmp_path}/run", "output.eval_every=2"]
    run_job(prepare(read_config(str(tmp_path / "small.py"), sets, 1), ALONE))
    written = [line.split() for line in (tmp_path / "run" / "losses.txt").read_text().splitlines()]
    lines = [line for line in lines_of(tmp_path / "run") if "validation_loss" in line]
    assert written == [[str(line["step"]), str(line["validation_loss"])] for line in lines]
    assert len(written) == 2
    assert f"losses are written to {tmp_path}/run/losses.txt" in capsys.readouterr().out


# -- those of a config -------------------------------------------------------------------------------------------------


def test_a_class_of_the_working_directory_is_called(folder: Path) -> None:
    run_job(prepared(folder / "run", *SHORT, "output.callbacks=('mine_of_test_callbacks:Steps',)"))
    written = (folder / "run" / "steps.txt").read_text().split()
    assert written == [str(x) for line in lines_of(folder / "run") for x in (line["step"], line["loss"])]


def test_a_class_beside_the_config_is_found_and_config_json_names_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text(MODULE)
    config = tmp_path / "configs" / "small.py"
    config.write_text("output = dict(callbacks=('mine:Steps',))")
    monkeypatch.chdir(tmp_path)
    found = read_config("configs/small.py", TINY, 1)
    assert found.output.callbacks == (f"{tmp_path}/configs/mine.py:Steps",)
    (kind,) = callbacks_of(found)
    (tmp_path / "config.json").write_text(json.dumps(found.to_dict()))
    assert callbacks_of(read_config("config.json", (), 1)) == (kind,)
    (tmp_path / "mine.py").write_text(MODULE)
    assert read_config("configs/small.py", TINY, 1).output.callbacks == (
        "mine:Steps",
    )  # the working directory is first


REFUSED = {
    "nowhere_at_all:Steps": "there is no module nowhere_at_all in ",
    "mine_of_test_callbacks:Step": "mine_of_test_callbacks has no Step. Did you mean mine_of_test_callbacks:Steps?",
    "mine_of_test_callbacks:Other": "Other is not a training.callbacks.Callback.",
    "mine_of_test_callbacks": "names no class. Try 'module:Class' or 'FILE.py:Class'.",
    "nowhere.py:Steps": "nowhere.py does not exist",
    "broken.py:Steps": "importing broken.py failed: NameError",
    "needs.py:Steps": "needs.py needs the module a_module_that_is_not_there",
}


def test_callbacks_that_cannot_be_found_are_refused_all_at_once_before_anything_is_written(folder: Path) -> None:
    (folder / "broken.py").write_text("undefined")
    (folder / "needs.py").write_text("import a_module_that_is_not_there")
    with pytest.raises(ConfigError) as caught:
        prepared(folder / "run", f"output.callbacks={tuple(REFUSED)}")
    for problem, (text, words) in zip(caught.value.problems, REFUSED.items(), strict=True):
        assert problem.startswith("output.callbacks: ")
        assert words in problem, text
        assert problem.count("output.callbacks") == 1, "a refusal was quoted in another one"
    assert not (folder / "run").exists()


def test_a_check_names_a_callback_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = [*TINY, "output.callbacks=('nowhere_at_all:Steps',)"]
    assert launch.main(launch.read_arguments(["--check", "--set", *sets])) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the run would be refused: output.callbacks: there is no module nowhere_at_all" in shown


def test_one_line_says_which_callback_ended_a_run_and_its_log_has_the_traceback(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    sets = [*TINY, *SHORT, f"output.dir={folder}/run", "output.callbacks=('mine_of_test_callbacks:Later',)"]
    assert launch.main(launch.read_arguments(["--set", *sets])) == 1  # 2 is a refusal before the training
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the callback mine_of_test_callbacks:Later failed in on_step: ZeroDivisionError: the reason")
    log = (folder / "run" / "logs" / "rank_0.log").read_text()
    assert 'raise ZeroDivisionError("the reason")' in log


def test_a_single_text_in_place_of_a_tuple_is_answered_with_the_tuple() -> None:
    with pytest.raises(ConfigError, match=r"output.loggers: needs a tuple, got 'wandb'. Try \('wandb',\)\."):
        read_config(None, ["output.loggers=wandb"], 1)

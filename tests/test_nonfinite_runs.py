"""Runs whose numbers are not finite: how they end, what they keep, and the marks of numbers that are far off."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import launch
from colonnade.cli import main as colonnade
from parallel.checkpoint import checkpoint
from parallel.checkpoint.index import Index
from parallel.checkpoint.newest import FoundCheckpoint, find_newest
from parallel.engine.engine import Engine
from parallel.errors import ExitCode, NonFiniteError
from tests.test_loop import TINY, prepared
from training import metrics
from training.loss_history import LossHistory
from training.outliers import KEPT, Outliers
from training.plot import draw_loss
from training.resume import history_of
from training.run import run_job

ROOT = Path(__file__).parents[1]
NAN = float("nan")
IN_STEP = "output.checkpoint_async=False"  # a NaN that is planted beside an update would reach a save that is running


def spoil(monkeypatch: pytest.MonkeyPatch, at: Callable[[int], bool], how: Callable[[Engine], object]) -> None:
    """Call `how` with the engine before each step, counted from 1, for which `at` is true."""
    step = Engine.train_step

    def spoiled(engine: Engine, batch: Any, **options: Any) -> Any:
        if at(engine.num_steps + 1):
            how(engine)
        return step(engine, batch, **options)

    monkeypatch.setattr(Engine, "train_step", spoiled)


def spoil_weight(engine: Engine) -> None:
    engine.chunks[1].master[5] = NAN


def spoil_next_gradient(engine: Engine) -> None:
    parameter = next(info for info in engine.part.infos if not info.is_matrix).parameter
    handle = parameter.register_hook(lambda x: x * NAN)
    engine.part.register_forward_pre_hook(lambda *_: None)
    update = engine.optimizer.step

    def step(*arguments: Any) -> None:
        handle.remove()
        patched.step = update
        update(*arguments)

    patched: Any = engine.optimizer
    patched.step = step


def trained(folder: Path, *assignments: str) -> int:
    run_of = ["--set", *TINY, f"output.dir={folder}", "output.checkpoint_every=1", IN_STEP, *assignments]
    return launch.main(launch.read_arguments(run_of))


def assert_kept_is_finite(folder: Path, newest: int) -> None:
    assert not (folder / "export").exists()
    found = find_newest(folder / checkpoint.CHECKPOINTS)
    assert found is not None
    assert found.index.folder.name == f"step_{newest:06d}"
    for file in folder.glob("checkpoints/step_*/*.safetensors"):
        assert all(bool(x.isfinite().all()) for x in load_file(file).values())


def test_a_weight_that_is_not_finite_ends_a_run_with_code_4_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, lambda step: step == 4, spoil_weight)
    assert trained(tmp_path) == ExitCode.NOT_FINITE
    assert_kept_is_finite(tmp_path, newest=3)
    assert "its weight model.decoder.layers.0." in capsys.readouterr().err
    *_, last = metrics.read(tmp_path / "metrics.jsonl")
    assert (last["step"], last["loss"], last["skipped"], last["nonfinite_steps"]) == (4, None, True, 1)


def test_a_row_that_no_token_uses_is_seen_when_it_is_to_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No loss and no gradient shows it: positions beyond the length of all samples."""

    def spoil_position(engine: Engine) -> None:
        piece = next(x for c in engine.chunks for x in c.spec.pieces(c.master) if "embed_positions" in x.name)
        piece.data[-1, 0] = NAN

    spoil(monkeypatch, lambda step: step == 3, spoil_position)
    assert trained(tmp_path) == ExitCode.NOT_FINITE
    assert_kept_is_finite(tmp_path, newest=2)
    error = capsys.readouterr().err
    assert "after step 3 model.decoder.embed_positions.weight is not finite (1 of " in error
    assert trained(tmp_path / "unsaved", "output.checkpoint_every=0") == ExitCode.NOT_FINITE
    assert "nothing is exported" in capsys.readouterr().err


def test_steps_that_are_left_out_are_counted_saved_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(monkeypatch, lambda step: step in (2, 5), spoil_next_gradient)
    assert trained(tmp_path, "train.nonfinite=skip") == ExitCode.DONE
    assert [line["nonfinite_steps"] for line in metrics.read(tmp_path / "metrics.jsonl")] == [0, 1, 1, 1, 2, 2]
    output = capsys.readouterr().out
    assert "2 steps with a number that was not finite" in output
    assert "step 5: the gradient's norm is nan: the step is left out (1 in a row, 2 in all)\n" in output
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert "step 5: the gradient's norm is nan: the step is left out (1 in a row, 2 in all)" in log
    counters = Index.read(tmp_path / "checkpoints" / "step_000006").metadata["counters"]
    assert (counters["nonfinite_steps"], counters["updates"], counters["step"]) == (2, 4, 6)


def test_a_validation_loss_that_is_not_finite_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = Engine.evaluate

    def spoiled(engine: Engine, batches: Any) -> float:
        engine.chunks[-1].parameters.whole[0] = torch.inf
        return evaluate(engine, batches)

    monkeypatch.setattr(Engine, "evaluate", spoiled)
    assert trained(tmp_path, "output.eval_every=3") == ExitCode.NOT_FINITE
    assert "the loss of the validation samples is nan after step 3" in capsys.readouterr().err
    assert len(list(metrics.read(tmp_path / "metrics.jsonl"))) == 3


def test_weights_that_are_not_finite_are_named_wherever_they_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_job(prepared(tmp_path / "run", "train.steps=1", "output.checkpoint_every=1"))
    export = tmp_path / "run" / "export" / "model.safetensors"
    tensors = load_file(export)
    tensors["model.decoder.layers.1.fc2.bias"][3] = torch.inf
    save_file(tensors, export, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"layers\.1\.fc2\.bias is not finite \(1 of 32 elements\)"):
        run_job(prepared(tmp_path / "next", f"model.path={export.parent}"))
    assert colonnade(["generate", str(export.parent), "--prompt", "a"]) == ExitCode.NOT_FINITE
    assert "layers.1.fc2.bias is not finite" in capsys.readouterr().err


# -- what is far from the steps before


def lines_of(values: list[float]) -> list[metrics.MetricsLine]:
    return [{"step": i, "loss": x, "grad_norm": 1.0} for i, x in enumerate(values, 1)]


def marked(outliers: Outliers, values: list[float]) -> list[int]:
    """Return the indices of the losses that are marked."""
    lines = lines_of(values)
    for line in lines:
        outliers.take(line)
    return [i for i, line in enumerate(lines) if line.get("outliers") == ["loss"]]


def wave(count: int) -> list[float]:
    return [2.0 + 0.1 * math.sin(i) for i in range(count)]


def test_a_loss_is_marked_by_six_deviations_of_the_last_hundred_and_not_before_there_are_twenty() -> None:
    said: list[str] = []
    assert marked(Outliers(said.append), [*wave(19), 9.0]) == []
    assert marked(Outliers(said.append), [*wave(20), 9.0, *wave(5)]) == [20]
    values = wave(300)
    last = values[200:]
    mean = sum(last) / 100
    deviation = math.sqrt(sum((x - mean) ** 2 for x in last) / 100)
    assert marked(Outliers(), [*values, mean + 5.99 * deviation]) == []
    assert marked(Outliers(), [*values, mean + 6.01 * deviation]) == [300]
    assert marked(Outliers(), [*values, mean - 6.01 * deviation]) == [300]
    (text,) = said
    assert text.startswith("step 21: loss 9 is ")
    assert text.endswith(" deviations above its last 20")


def test_a_level_that_has_changed_for_good_is_marked_a_few_times_and_not_for_ever() -> None:
    assert marked(Outliers(), [*wave(100), *(x + 3 for x in wave(100))]) == [100, 101, 102]


def test_equal_values_are_not_marked_and_a_jump_after_them_is() -> None:
    assert marked(Outliers(), [2.0] * 50 + [2.0 + 1e-9, 3.0]) == [51]
    assert marked(Outliers(), [0.0] * 50 + [1.0]) == [50]


def test_numbers_that_are_not_finite_do_not_enter_the_history() -> None:
    outliers = Outliers()
    assert marked(outliers, [*wave(50), NAN, math.inf, 2.05, 9.0]) == [53]
    assert len(outliers.state()["loss"]) == 52


def test_the_history_goes_on_bit_for_bit_and_has_a_hundred_values() -> None:
    whole, first, second = Outliers(), Outliers(), Outliers()
    values = [*wave(130), 8.0, *wave(40)]
    marks = marked(whole, values)
    before = marked(first, values[:90])
    second.restore(first.state())
    assert before + [90 + i for i in marked(second, values[90:])] == marks
    assert second.state() == whole.state()
    assert len(whole.state()["loss"]) == KEPT


def test_a_run_marks_a_loss_in_its_metrics_and_in_its_picture_and_resumes_its_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("training.outliers.NEEDED", 4)
    monkeypatch.setattr("training.outliers.FAR", 3.0)

    def enlarge(engine: Engine) -> None:
        for chunk in engine.chunks:
            chunk.master.mul_(30)

    spoil(monkeypatch, lambda step: step == 6, enlarge)
    assert trained(tmp_path) == ExitCode.DONE
    *_, last = metrics.read(tmp_path / "metrics.jsonl")
    assert "loss" in last["outliers"]
    assert "deviations above its last 5" in capsys.readouterr().out
    lines = list(metrics.read(tmp_path / "metrics.jsonl"))
    saved = FoundCheckpoint(Index.read(checkpoint.step_folder(tmp_path, 6)))
    assert history_of(saved).outliers.state() == {key: [line[key] for line in lines] for key in ("loss", "grad_norm")}
    assert history_of(None).outliers.state() == LossHistory().outliers.state()
    assert draw_loss(tmp_path / "metrics.jsonl", tmp_path / "marked.png")


PLANTED = """
import os

from parallel.engine.engine import Engine
from training.callbacks import Callback

step = Engine.train_step


def spoiled(engine, batch, **options):
    if engine.num_steps == 3 and os.environ["RANK"] == "1":
        engine.chunks[1].master[5] = float("nan")
        engine.chunks[1].write_back()
    return step(engine, batch, **options)


class Spoiler(Callback):
    def on_start(self, run):
        pass


Engine.train_step = spoiled
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parallel.pipeline=2", "zero.stage=3", "parallel.tensor=1d"])
def test_two_ranks_end_with_code_4_and_keep_the_checkpoint_before(tmp_path: Path, layout: str) -> None:
    (tmp_path / "spoiler.py").write_text(PLANTED)
    run_of = [*TINY, f"output.dir={tmp_path / 'run'}", "output.checkpoint_every=1", IN_STEP, layout]
    run_of += [f"output.callbacks=['{tmp_path}/spoiler.py:Spoiler']", "train.timeout_seconds=60"]
    command = [sys.executable, "-m", "colonnade", "train", "--nprocs", "2", "--set", *run_of]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == ExitCode.NOT_FINITE, done.stderr
    assert_kept_is_finite(tmp_path / "run", newest=3)
    assert "step 4: " in done.stderr
    assert "rank 1 on " in done.stderr
    assert "Traceback" not in done.stderr
    command[-len(run_of) - 1 :] = ["--resume", "auto", "--set", *run_of[:-2], "output.callbacks=()"]
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 0, again.stderr

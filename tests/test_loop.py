"""Whole runs, the files that they leave, and runs that resume."""

import dataclasses
import errno
import fcntl
import json
import logging
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import launch
from models.data import Batch, Loader
from models.family import named_sizes
from models.shapes import fields_of
from parallel.engine.context import Place, make_context
from parallel.engine.engine import Engine
from parallel.engine.results import StepResult
from parallel.errors import CheckpointError, ConfigError, ExitCode
from tests.checkpoints import seal
from tests.harness import run
from training import metrics, plot
from training.callbacks import Callback, Callbacks, Run
from training.config import read_config
from training.loop import fit
from training.loss_history import LossHistory
from training.metrics import Meter, MetricsLine
from training.metrics_file import MetricsFile
from training.preflight import Job, prepare
from training.preview import device_messages
from training.run import make_engine, make_loader, run_job
from training.run_folder import RunFolder

TINY = (
    "model.hidden_size=32",
    "model.ffn_dim=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.dropout=0.1",
    "data.sequence_length=16",
    "data.validation_fraction=0.002",
    "train.steps=6",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "lr_scheduler.warmup_steps=2",
)
TIMES = (
    *("step_seconds", "phases", "tokens_per_second", "tflops", "mfu"),
    *("peak_host_bytes", "peak_device_bytes"),
)


ALONE = Place(local_world_size=os.cpu_count() or 1)  # one thread for each rank: other tests run on the cores too


def prepared(folder: Path, *assignments: str, resume: str | None = None, place: Place = ALONE) -> Job:
    config = read_config(None, [*TINY, f"output.dir={folder}", *assignments], place.world_size)
    return prepare(config, place, resume=resume)


def lines_of(folder: Path) -> list[MetricsLine]:
    """Return the lines of metrics.jsonl without the keys in which any two runs differ."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics.read(folder / "metrics.jsonl")]


class Recorder(Callback):
    """Keeps what it is told, in order."""

    def __init__(self) -> None:
        self.lines: list[MetricsLine] = []
        self.told: list[tuple[Any, ...]] = []

    def on_start(self, run: Run) -> None:
        self.told.append(("start", run.num_steps))

    def on_step(self, line: MetricsLine) -> None:
        self.lines.append(line)
        self.told.append(("step", line["step"]))

    def on_evaluate(self, step: int, loss: float) -> None:
        self.told.append(("evaluate", step, loss))

    def on_checkpoint(self, step: int, folder: Path) -> None:
        self.told.append(("checkpoint", step, folder.name))

    def on_end(self, error: BaseException | None) -> None:
        self.told.append(("end", error))


def fitted(engine: Engine, loader: Loader) -> list[MetricsLine]:
    """Train with the loop alone, without a run around it, and return the lines of its steps."""
    recorder = Recorder()
    callbacks = Callbacks([recorder], [], engine.mesh.world)
    fit(engine, loader, callbacks=callbacks, save=lambda step: Path(), history=LossHistory())
    return recorder.lines


def run_of(folder: Path, num_steps: int = 0) -> Run:
    """Return what a callback is told of a run that has taken some steps before."""
    return Run(read_config(None, TINY, 1), folder, rank=0, num_steps=num_steps, log=print)


def strict_json(text: str) -> Any:
    """Return the value of JSON as the standard defines it: NaN is an error."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


# -- what a run leaves -------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_run_leaves_the_files_that_the_readme_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, on_gpu = tmp_path / "run", torch.cuda.is_available()
    run_job(prepared(folder, "output.eval_every=4", "output.checkpoint_every=2", "output.log_every=3"))
    lines = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in lines] == [step * 8 * 16 for step in range(1, 7)]
    assert ["validation_loss" in line for line in lines] == [False, False, False, True, False, True]
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(8 * 16 / line["step_seconds"])
        assert line["peak_host_bytes"] > 10**7
        assert (line["peak_device_bytes"] > 0, line["skipped"]) == (on_gpu, False)
        assert line["mfu"] is None or on_gpu
    assert sorted(path.name for path in (folder / "checkpoints").glob("step_*")) == ["step_000004", "step_000006"]
    saved = json.loads((folder / "config.json").read_text())
    assert saved["model"]["vocab_size"] == 260
    assert saved["output"]["dir"] == str(folder)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    log = (folder / "logs" / "rank_0.log").read_text()
    assert all(word in log for word in ("torch", "coordinates", "saved", "exported", "done"))

    transformers = pytest.importorskip("transformers")
    model = transformers.OPTForCausalLM.from_pretrained(folder / "export")
    assert model.dtype == torch.float32
    assert (folder / "export" / "tokenizer.json").exists()

    shown = capsys.readouterr().out
    plain_lines = [line for line in shown.splitlines() if "tokens/s" in line and "step" in line]
    assert [line.split()[1] for line in plain_lines] == ["3/6", "6/6"]
    assert f"{lines[-1]['loss']:.4f}" in shown
    assert f"{lines[-1]['validation_loss']:.4f}" in shown


def test_an_earlier_run_is_renamed_and_a_resumed_one_keeps_its_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", resumed=False)
    config = read_config(None, TINY, 1)
    assert folder.make(config) is None
    (folder.path / "mark").write_text("first")
    assert folder.make(config) == tmp_path / "run.1"
    (folder.path / "mark").write_text("second")
    assert folder.make(config) == tmp_path / "run.2"
    assert [(tmp_path / name / "mark").read_text() for name in ("run.1", "run.2")] == ["first", "second"]
    (folder.path / "mark").write_text("third")
    assert dataclasses.replace(folder, resumed=True).make(config) is None
    assert (folder.path / "mark").read_text() == "third"


def test_a_folder_in_which_a_run_is_writing_is_refused_to_another_run(tmp_path: Path) -> None:
    """The second of two runs with one name once renamed the folder of the first, which was still running."""
    folder = RunFolder(tmp_path / "run", resumed=False)
    folder.make(read_config(None, TINY, 1))
    with folder.lock.held():
        for other in (folder, dataclasses.replace(folder, resumed=True)):
            with pytest.raises(ConfigError, match="a run that has not ended writes in"):
                other.check_writable()
            with pytest.raises(BlockingIOError):
                other.make(read_config(None, TINY, 1))
        assert not (tmp_path / "run.1").exists()
    folder.check_writable()
    assert not folder.lock.file.exists()


def test_a_run_that_fails_leaves_its_traceback_in_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(engine: Engine, batch: object, **_: Any) -> StepResult:
        raise ZeroDivisionError("the reason")

    monkeypatch.setattr(Engine, "train_step", break_down)
    with pytest.raises(ZeroDivisionError):
        run_job(prepared(tmp_path / "run"))
    log = (tmp_path / "run" / "logs" / "rank_0.log").read_text()
    assert "Traceback" in log
    assert "ZeroDivisionError: the reason" in log
    assert not [h for h in logging.getLogger().handlers if str(tmp_path) in str(h)]  # the log is closed


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, shuffle: bool) -> None:
    options = (f"data.shuffle={shuffle}", "output.checkpoint_every=2", "output.eval_every=2")
    run_job(prepared(tmp_path / "whole", *options))
    run_job(prepared(tmp_path / "cut", *options, "train.steps=5", "lr_scheduler.kind=constant"))
    run_job(prepared(tmp_path / "constant", *options, "lr_scheduler.kind=constant"))
    again = prepared(tmp_path / "cut", *options, "lr_scheduler.kind=constant", resume="auto")
    assert again.resume_from == tmp_path / "cut" / "checkpoints" / "step_000004"
    run_job(again)
    assert lines_of(tmp_path / "cut") == lines_of(tmp_path / "constant")
    first, second = (tmp_path / name / "export" / "model.safetensors" for name in ("cut", "constant"))
    assert first.read_bytes() == second.read_bytes()
    assert lines_of(tmp_path / "whole") != lines_of(tmp_path / "cut")  # the comparison can tell two runs apart


@pytest.mark.gpu
def test_a_run_resumes_in_another_layout(tmp_path: Path) -> None:
    run_job(prepared(tmp_path / "one", "output.checkpoint_every=3"))
    checkpoint = str(tmp_path / "one" / "checkpoints" / "step_000003")
    literal = {
        "tensor": "parallel.tensor={'mode': '1d', 'size': 2}",
        "pipe": "parallel.pipeline=2",
        "data": "train.seed=0",
    }
    for name, layout in literal.items():
        run(resume_in_two, 2, tmp_path / name, layout, checkpoint)
        resumed, whole = lines_of(tmp_path / name), lines_of(tmp_path / "one")[3:]
        assert [line["step"] for line in resumed] == [4, 5, 6]
        for ours, theirs in zip(resumed, whole, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert sorted(path.name for path in (tmp_path / name / "logs").iterdir()) == ["rank_0.log", "rank_1.log"]


def resume_in_two(rank: int, world_size: int, folder: Path, layout: str, checkpoint: str) -> None:
    job = prepared(folder, layout, resume=checkpoint, place=Place(rank, world_size, rank, ALONE.local_world_size))
    dist.barrier()  # every rank is connected before any of them writes
    run_job(job)


SAVES = "output.checkpoint_every=3"


def error_in_two(rank: int, world_size: int, folder: Path, resume: str | None) -> str:
    place = Place(rank, world_size, rank, ALONE.local_world_size)
    job = prepared(folder, "parallel.tensor={'mode': '1d', 'size': 2}", SAVES, resume=resume, place=place)
    dist.barrier()
    try:
        run_job(job)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_a_file_that_one_rank_cannot_read_is_named_on_every_rank(tmp_path: Path) -> None:
    checkpoint = tmp_path / "one" / "checkpoints" / "step_000003"
    assert run(error_in_two, 2, tmp_path / "one", None) == ["no error"] * 2
    file = checkpoint / "rank_00001.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    for message in run(error_in_two, 2, tmp_path / "two", str(checkpoint)):
        assert "rank_00001.safetensors is damaged" in message


def test_a_checkpoint_of_another_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run_job(prepared(tmp_path / "run", "output.checkpoint_every=6", "output.export=False"))
    with pytest.raises(CheckpointError, match=r"ffn_dim 64, not 48"):
        prepared(tmp_path / "other", "model.ffn_dim=48", resume=str(tmp_path / "run"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("change", "words"), [("num_attention_heads=2", "4, not 2"), ("activation_function=gelu", "")])
def test_a_checkpoint_of_another_function_of_the_same_weights_is_refused(
    tmp_path: Path, change: str, words: str
) -> None:
    run_job(prepared(tmp_path / "run", "train.steps=2", "output.checkpoint_every=2", "output.export=False"))
    with pytest.raises(CheckpointError, match=f"of another model: it has {change.split('=')[0]} {words}"):
        prepared(tmp_path / "run", f"model.{change}", resume="auto")
    prepared(tmp_path / "run", "model.attention_dropout=0.3", "model.init_std=0.1", resume="auto")


def test_a_checkpoint_of_another_family_is_refused_by_the_familys_name_alone(tmp_path: Path) -> None:
    """Fields that only one of the two families has were named as well: `ffn_dim None, not 64`."""
    index = dict(metadata=dict(model=fields_of(named_sizes()["llama-tiny"])), files={}, tensors={})
    (tmp_path / "checkpoint.json").write_text(json.dumps(index))
    seal(tmp_path)
    with pytest.raises(CheckpointError, match=r"is of another model: it has model_type llama, not opt\.$"):
        prepared(tmp_path / "other", resume=str(tmp_path))


def test_a_damaged_checkpoint_is_refused_before_anything_is_written_and_the_one_before_is_named(tmp_path: Path) -> None:
    run_job(prepared(tmp_path / "run", "output.checkpoint_every=3", "output.export=False"))
    newest, other = tmp_path / "run" / "checkpoints" / "step_000006", tmp_path / "other"
    file = newest / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=rf"is damaged.*Try --resume {newest.parent}/step_000003\."):
        prepared(other, resume=str(newest))
    assert not other.exists()


def test_weights_and_disks_in_a_folder_that_will_be_renamed_are_refused(tmp_path: Path) -> None:
    """Such a run once started from drawn weights, without any message."""
    folder = tmp_path / "run"
    run_job(prepared(folder, "train.steps=2", "output.checkpoint_every=2"))
    with pytest.raises(ConfigError, match=r"model.path: .*export lies in output.dir"):
        prepared(folder, f"model.path={folder}/export")
    with pytest.raises(ConfigError, match=r"zero.nvme_dir: .* lies in output.dir"):
        prepared(folder, f"zero.nvme_dir={folder}/logs", "zero.tensor_placement_policy=cpu")
    again = prepared(tmp_path / "other", f"model.path={folder}/export")
    assert f"weights from {folder}/export" in again.messages
    assert "weights drawn from train.seed 0" in prepared(tmp_path / "other").messages
    assert prepared(folder, f"model.path={folder}/export", resume="auto").resume_from is not None


def test_inputs_that_a_user_may_not_have_meant_are_reported(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_job(prepared(folder, "train.steps=1"))
    file = folder / "export" / "tokenizer.json"
    other = tmp_path / "other", f"model.path={folder}/export"
    assert not any("tokenizer of its own" in message for message in prepared(*other).messages)
    file.write_text(file.read_text() + " ")
    assert any("tokenizer of its own" in message for message in prepared(*other).messages)
    messages = prepared(*other, "data.validation_fraction=0", "output.eval_every=2").messages
    assert any("no validation" in message for message in messages)


@pytest.mark.gpu
def test_a_pipeline_that_is_split_for_cpus_is_reported(tmp_path: Path) -> None:
    for assignment, reported in (("train.device=auto", not torch.cuda.device_count()), ("train.device=cpu", False)):
        config = read_config(None, ["parallel.pipeline=2", assignment], 2)
        assert bool(device_messages(config)) is reported


def test_many_may_look_at_a_lock_at_once_and_it_is_removed_whatever_happens(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, resumed=True)
    with suppress(RuntimeError), folder.lock.held():
        assert folder.lock.is_held()
        raise RuntimeError
    assert not folder.lock.file.exists()
    folder.lock.file.touch()
    with folder.lock.file.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not folder.lock.is_held()


def test_a_file_system_without_locks_blocks_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    folder = RunFolder(tmp_path, resumed=True)
    with folder.lock.held():
        assert not folder.lock.is_held()


def test_resuming_without_a_checkpoint_starts_from_the_beginning_with_a_message(tmp_path: Path) -> None:
    job = prepared(tmp_path / "run", resume="auto")
    assert job.resume_from is None
    assert "nothing to resume" in job.messages[0]
    with pytest.raises(CheckpointError):
        prepared(tmp_path / "run", resume=str(tmp_path / "nowhere"))


def test_a_resumed_run_with_no_steps_left_exports_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_job(prepared(tmp_path / "run", "output.checkpoint_every=6", "output.export=False"))
    run_job(prepared(tmp_path / "run", "train.steps=3", resume="auto"))
    assert "none left to take: 6 were taken before" in capsys.readouterr().out
    assert len(lines_of(tmp_path / "run")) == 6
    assert (tmp_path / "run" / "export").exists()


# -- parts -------------------------------------------------------------------------------------------------------------


def test_metrics_are_valid_json_whatever_the_loss(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.on_start(run_of(tmp_path))
    for step, loss in enumerate((1.5, math.nan, math.inf), 1):
        file.on_step({"step": step, "loss": loss, "grad_norm": None})
        flushed = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert len(flushed) == step
    file.on_end(None)
    assert [strict_json(line)["loss"] for line in flushed] == [1.5, None, None]


def test_a_run_whose_numbers_are_not_finite_ends_with_code_4_and_keeps_what_was_finite(tmp_path: Path) -> None:
    """A rate of 1e30 makes the weights of the second step too large: steps before it are kept, none after it."""
    run_of = ["--set", *TINY, f"output.dir={tmp_path}", "optimizer.lr=1e30", "output.checkpoint_every=1"]
    assert launch.main(launch.read_arguments(run_of)) == ExitCode.NOT_FINITE
    assert not (tmp_path / "export").exists()
    last = strict_json((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    saved = sorted(int(path.name.removeprefix("step_")) for path in (tmp_path / "checkpoints").glob("step_*"))
    assert saved[-1] == last["step"] - 1
    for file in (tmp_path / "checkpoints").glob("step_*/*.safetensors"):
        assert all(bool(x.isfinite().all()) for x in load_file(file).values())


def test_a_resumed_run_removes_the_lines_after_its_checkpoint_and_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    file = MetricsFile(path)
    file.on_start(run_of(tmp_path, num_steps=2))
    file.on_step({"step": 3, "loss": 0.5})
    file.on_end(None)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.5}\n'


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_the_peak_of_a_device_follows_from_its_name(
    name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert metrics.peak_tflops(torch.device("cuda")) == peak


def test_tflops_are_those_of_one_device() -> None:
    """Each token takes 6 N + 12 L H S, with the matrices of N counted by hand: the embedding once, no positions."""
    config = read_config(None, TINY, 1)
    layer = 4 * 32 * 32 + 2 * 32 * 64
    flops = 8 * 16 * (6 * (260 * 32 + 2 * layer) + 12 * 2 * 32 * 16)
    line = Meter(config, 4, torch.device("cpu")).line(3, StepResult(2.0, 1.0, 0.1, 120), 0.5, samples=24)
    assert line["tflops"] == pytest.approx(flops / 0.5 / 4 / 1e12)
    assert line["tokens"] == 3 * 8 * 16


def test_smoothing_keeps_a_straight_line_straight() -> None:
    straight = [3.0 - 0.01 * step for step in range(200)]
    assert plot.smoothed(straight) == pytest.approx(straight)
    assert plot.smoothed([0.0, 1.0] * 100)[50:150] == pytest.approx([0.5] * 100, abs=0.1)


def test_without_matplotlib_nothing_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert plot.draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png") is False


@pytest.mark.parametrize("make", [lambda path: path.write_text(""), lambda path: (path.mkdir(), path.chmod(0o500))])
def test_an_output_folder_that_cannot_be_made_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "runs")
    try:
        with pytest.raises(ConfigError, match=r"output\.dir"):
            RunFolder(tmp_path / "runs" / "x", resumed=False).check_writable()
    except pytest.fail.Exception:
        if (tmp_path / "runs").is_dir():
            pytest.skip("this user may write anywhere")
        raise


def test_the_loop_needs_no_launcher_and_gives_each_step_its_own_batch(tmp_path: Path) -> None:
    job = prepared(tmp_path / "run")
    engine = make_engine(make_context(job.config, job.place), job)
    loader = make_loader(engine, job)
    taken: list[int] = []
    training = loader.training

    def watched(first: int) -> Batch:
        taken.append(first)
        return training(first)

    loader.training = watched  # type: ignore[method-assign]
    lines = fitted(engine, loader)
    assert taken == [0, 8, 16, 24, 32, 40]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run").exists()


# -- 8 bits ------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_multiplies_8_bits_by_the_scales_that_it_had(tmp_path: Path) -> None:
    """The checkpoints of a run had no scales, unlike those of `save_checkpoint`: a resumed run began with bf16."""
    keys = ("train.precision=fp8", "train.fp8_min_elements=0", "train.steps=3", "output.export=False")
    run_job(prepared(tmp_path / "whole", *keys, "output.checkpoint_every=2"))
    at = str(tmp_path / "whole" / "checkpoints" / "step_000002")
    run_job(prepared(tmp_path / "resumed", *keys, resume=at))
    assert lines_of(tmp_path / "resumed")[-1] == lines_of(tmp_path / "whole")[-1]

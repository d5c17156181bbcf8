"""The phases of a step's time in metrics.jsonl, and traces of chosen steps."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import launch
from parallel.checkpoint.index import Index
from parallel.checkpoint.newest import FoundCheckpoint
from parallel.config import PipelineConfig
from parallel.engine.context import Place, make_context
from parallel.engine.engine import Engine
from parallel.engine.phases import PHASES, Stopwatch
from parallel.engine.results import StepResult
from parallel.errors import ConfigError
from parallel.pipeline.schedule import plan_of
from parallel.plan.plan import Op
from tests.harness import run
from tests.test_loop import ALONE, TINY, fitted, lines_of, prepared
from training import metrics
from training.config import read_config
from training.length import RunPosition
from training.preflight import prepare
from training.run import make_engine, make_loader, run_job
from training.tracer import Tracer, steps_to_trace

CPU = torch.device("cpu")


# -- phases ------------------------------------------------------------------------------------------------------------


def test_a_stopwatch_adds_up_each_phase_and_stops_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    times: Iterator[float] = iter([0, 1, 3, 6, 100, 107])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    stopwatch = Stopwatch(CPU)
    for phase in ("forward", "backward", "forward"):
        stopwatch.mark(phase)
    nothing = dict.fromkeys(PHASES, 0.0)
    assert stopwatch.read() == nothing | {"forward": 4, "backward": 2}
    stopwatch.mark("data")
    assert stopwatch.read() == nothing | {"data": 7}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_phases_of_a_step_add_up_to_its_seconds(device: str, tmp_path: Path) -> None:
    """The clock of a step starts before its first phase and ends after its last. A process may be interrupted between
    two readings, but not in every step: time that is missing in all steps was not marked."""
    if device == "cuda" and not torch.cuda.is_available():  # a process that has asked could not be forked for a GPU
        pytest.skip("there is no GPU")
    job = prepared(tmp_path, f"train.device={device}")
    context = make_context(job.config, job.place)
    engine = make_engine(context, job)
    lines = fitted(engine, make_loader(engine, job))
    assert "validation_loss" in lines[-1]
    if device == "cuda":  # work that the device has not finished when a step ends is counted in the next line
        total = sum(sum(line["phases"].values()) for line in lines)
        assert 0.8 < total / sum(line["step_seconds"] for line in lines) < 1.001
        assert {phase for phase in PHASES if not sum(line["phases"][phase] for line in lines)} == {"transfer"}
    else:
        shares = [sum(line["phases"].values()) / line["step_seconds"] for line in lines]
        assert max(shares) > 0.95
        assert all(share < 1 for share in shares)
        for line in lines:
            assert {phase for phase, seconds in line["phases"].items() if seconds == 0} == {"transfer"}
    assert all(tuple(line["phases"]) == PHASES for line in lines)


# -- traces ------------------------------------------------------------------------------------------------------------


def ranges(trace: Path) -> list[str]:
    """Return the names of our ranges in a trace, in order of time."""
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("cat") == "user_annotation"]
    named = [e for e in sorted(events, key=lambda e: float(e["ts"])) if e["name"].split()[0] in ("step", *PHASES)]
    return [e["name"] for e in named]


def trace_two_stages(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Train with traces of steps 2 and 3, and return the metrics of the last step."""
    config = read_config(None, [*TINY, f"output.dir={folder}", "parallel.pipeline=2"], world_size)
    place = Place(rank, world_size, rank, ALONE.local_world_size)
    job = prepare(config, place, profile=range(2, 4))
    dist.barrier()  # every rank is connected before any of them writes
    run_job(job)
    return dict(list(metrics.read(folder / "metrics.jsonl"))[-1])


@pytest.mark.gpu
def test_each_stage_of_a_pipeline_leaves_a_trace_of_the_steps_asked_for(tmp_path: Path) -> None:
    line, _ = run(trace_two_stages, 2, tmp_path / "run")
    assert all(line["phases"][phase] > 0 for phase in PHASES)
    for rank, actions in enumerate(plan_of(PipelineConfig(size=2), 2, recomputes=False).ranks):
        names = ranges(tmp_path / "run" / "profile" / f"rank_{rank}.json")
        assert [name for name in names if name.startswith("step")] == ["step 2", "step 3"]
        assert {name.split()[0] for name in names} == {"step", *PHASES}
        computes = [
            f"{'forward' if action.op is Op.F else 'backward'} {action}"
            for action in actions
            if not action.op.is_transfer
        ]
        assert [name for name in names if name.startswith(("forward", "backward"))] == 2 * computes


def test_a_profiler_exists_only_during_the_steps_asked_for(tmp_path: Path) -> None:
    file, done, alive = tmp_path / "profile" / "rank_0.json", list[list[str]](), list[bool]()
    tracer = Tracer(range(2, 4), file, CPU, say=lambda text: done.append(ranges(file)))
    for step in range(1, 6):
        with tracer.around_step(step):
            alive.append(torch.autograd.profiler._is_profiler_enabled)
        assert done == ([["step 2", "step 3"]] if step >= 3 else [])
    assert alive == [False, True, True, False, False]


def test_a_run_that_ends_during_its_traced_steps_stops_the_profiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C there once ended in a segmentation fault, because the process exited while the profiler was running."""
    alive: list[bool] = []

    def break_down(engine: Engine, batch: object, **_: Any) -> StepResult:
        alive.append(torch.autograd.profiler._is_profiler_enabled)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "train_step", break_down)
    job = prepared(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run_job(dataclasses.replace(job, profile=range(1, 3)))
    assert [*alive, torch.autograd.profiler._is_profiler_enabled] == [True, False]
    assert not (tmp_path / "run" / "profile").exists()


def test_launch_traces_the_steps_that_exist_and_prints_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    folder = tmp_path / "run"
    arguments = ["--profile", "6:60", "--set", *TINY, f"output.dir={folder}", "output.export=False"]
    assert launch.main(launch.read_arguments(arguments)) == 0
    trace = folder / "profile" / "rank_0.json"
    assert f"traced: {trace}\n" in capsys.readouterr().out
    assert [name for name in ranges(trace) if name.startswith("step")] == ["step 6"]
    (times,) = json.loads((folder / "profile" / "actions_rank_0.json").read_text())["steps"]
    assert times["step"] == 6


def test_a_resumed_run_traces_only_steps_that_it_takes(tmp_path: Path) -> None:
    run_job(prepared(tmp_path, "output.checkpoint_every=3", "output.keep_checkpoints=2", "output.export=False"))
    found = FoundCheckpoint(Index.read(tmp_path / "checkpoints" / "step_000003"))
    for asked, taken in ((range(2, 4), range(0)), (range(2, 6), range(4, 6)), (range(5, 9), range(5, 7))):
        coming, messages = steps_to_trace(asked, taken=RunPosition.before(found).steps, steps=6)
        assert list(coming) == list(taken)
        expected = [f"--profile {asked.start}:{asked.stop}: nothing to trace, 3 of 6 steps were taken before"]
        assert messages == ([] if taken else expected)
    assert len(lines_of(tmp_path)) == 6
    assert not (tmp_path / "profile").exists()


# -- refusing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("10",), "'10' is not A:B; 10:13 traces steps 10, 11 and 12"),
        (("a:b",), "'a:b' is not A:B; "),
        (("0:3",), "0:3 needs 1 <= A < B: steps count from 1, and B is not included. Try 1:3"),
        (("5:5",), "Try 5:6"),
        (("7:3",), "Try 7:8"),
        (("10:13", "--check"), "--profile is for a run, and --check starts none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_steps_that_make_no_sense_exit_with_2_and_steps_that_would_work(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        launch.read_arguments(["--profile", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_steps_past_the_last_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = read_config(None, [*TINY, f"output.dir={tmp_path / 'run'}"], 1)
    with pytest.raises(ConfigError, match=r"--profile 7:9: step 7 is past the last, train\.steps=6\. Try 6:7\."):
        prepare(config, ALONE, profile=range(7, 9))
    assert list(tmp_path.iterdir()) == []

"""Where a step's time goes: phases in metrics.jsonl, and traces of chosen steps."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import launch
from parallel.engine.base import StepResult
from parallel.engine.context import Place, make_context
from parallel.engine.engine import Engine
from parallel.engine.phases import PHASES, Stopwatch
from parallel.errors import ConfigError
from parallel.pipeline.schedule import Op, one_f_one_b
from tests.harness import run
from tests.test_loop import ALONE, TINY, lines_of, start
from training import loop, metrics, preflight
from training.tracer import Tracer

CPU = torch.device("cpu")


# -- phases ------------------------------------------------------------------------------------------------------------


def test_a_stopwatch_adds_up_each_phase_and_stands_still_once_read(monkeypatch: pytest.MonkeyPatch) -> None:
    moments: Iterator[float] = iter([0, 1, 3, 6, 100, 107])
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    stopwatch = Stopwatch(CPU)
    for phase in ("forward", "backward", "forward"):
        stopwatch.mark(phase)
    nothing = dict.fromkeys(PHASES, 0.0)
    assert stopwatch.read() == nothing | {"forward": 4, "backward": 2}
    stopwatch.mark("data")
    assert stopwatch.read() == nothing | {"data": 7}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_phases_of_a_step_add_up_to_its_seconds(device: str, tmp_path: Path) -> None:
    """The clock of the step starts before the first phase and ends after the last. A process may be put aside between
    two readings, but not in every step: what all steps lack has been forgotten by the marks."""
    if device == "cuda" and not torch.cuda.is_available():  # asked here: a fork of who asked can use no GPU
        pytest.skip("there is no GPU")
    job = start(tmp_path, f"train.device={device}")
    context = make_context(job.config, job.place)
    engine, lines = loop.make_engine(context, job), list[metrics.MetricsLine]()
    loop.fit(engine, loop.make_loader(engine, job), loop.Listeners(lines.append, lambda step: None), validates=True)
    assert "validation_loss" in lines[-1]
    if device == "cuda":  # what the device has not come to counts in the next line
        total = sum(sum(line["phases"].values()) for line in lines)
        assert 0.8 < total / sum(line["step_seconds"] for line in lines) < 1.001
        lines = lines[1:]
    else:
        shares = [sum(line["phases"].values()) / line["step_seconds"] for line in lines]
        assert max(shares) > 0.95
        assert all(share < 1 for share in shares)
    for line in lines:
        assert tuple(line["phases"]) == PHASES
        assert {phase for phase, seconds in line["phases"].items() if seconds == 0} == {"transfer"}


# -- traces ------------------------------------------------------------------------------------------------------------


def ranges(trace: Path) -> list[str]:
    """The names of our ranges, in order of time."""
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("cat") == "user_annotation"]
    named = [e for e in sorted(events, key=lambda e: float(e["ts"])) if e["name"].split()[0] in ("step", *PHASES)]
    return [e["name"] for e in named]


def trace_two_stages(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """The last step's line."""
    config = preflight.read_config(None, [*TINY, f"output.dir={folder}", "parallel.pipeline=2"], world_size)
    place = Place(rank, world_size, rank, ALONE.local_world_size)
    job = preflight.inspect(config, place, profiled=range(2, 4))
    dist.barrier()  # ranks that have yet to meet do so before any of them writes
    loop.run(job)
    return dict(list(metrics.read(folder / "metrics.jsonl"))[-1])


@pytest.mark.gpu
def test_each_stage_of_a_pipeline_leaves_a_trace_of_the_steps_asked_for(tmp_path: Path) -> None:
    line, _ = run(trace_two_stages, 2, tmp_path / "run")
    assert all(line["phases"][phase] > 0 for phase in PHASES)
    for rank, actions in enumerate(one_f_one_b(2, 2).ranks):
        names = ranges(tmp_path / "run" / "profile" / f"rank_{rank}.json")
        assert [name for name in names if name.startswith("step")] == ["step 2", "step 3"]
        assert {name.split()[0] for name in names} == {"step", *PHASES}
        computes = [f"{'forward' if action.op is Op.F else 'backward'} {action}" for action in actions]
        if rank > 0:  # weights have their gradients once the first stage has its own
            computes = [n for name in computes for n in (name, *([name.replace(" B", " W")] if " B" in name else []))]
        assert [name for name in names if name.startswith(("forward", "backward"))] == 2 * computes


def test_a_profiler_lives_for_the_steps_asked_for_alone(tmp_path: Path) -> None:
    file, done, alive = tmp_path / "profile" / "rank_0.json", list[list[str]](), list[bool]()
    tracer = Tracer(range(2, 4), file, CPU, done=lambda: done.append(ranges(file)))
    for step in range(1, 6):
        with tracer.around(step):
            alive.append(torch.autograd.profiler._is_profiler_enabled)
        assert done == ([["step 2", "step 3"]] if step >= 3 else [])
    assert alive == [False, True, True, False, False]


def test_a_run_that_breaks_off_among_its_traced_steps_ends_the_profiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C there once ended in a segmentation fault: the process exited with the profiler alive."""
    alive: list[bool] = []

    def break_down(engine: Engine, batch: object) -> StepResult:
        alive.append(torch.autograd.profiler._is_profiler_enabled)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "train_step", break_down)
    job = start(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        loop.run(dataclasses.replace(job, profiled=range(1, 3)))
    assert [*alive, torch.autograd.profiler._is_profiler_enabled] == [True, False]
    assert not (tmp_path / "run" / "profile").exists()


def test_launch_profiles_what_there_is_of_the_steps_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("signal.signal", lambda number, handler: None)
    folder = tmp_path / "run"
    arguments = ["--profile", "6:60", "--set", *TINY, f"output.dir={folder}", "output.export=False"]
    assert launch.main(launch.read_arguments(arguments)) == 0
    trace = folder / "profile" / "rank_0.json"
    assert f"traced: {trace}\n" in capsys.readouterr().out
    assert [name for name in ranges(trace) if name.startswith("step")] == ["step 6"]


def test_a_resumed_run_traces_the_steps_that_it_takes(tmp_path: Path) -> None:
    loop.run(start(tmp_path, "output.checkpoint_every=3", "output.keep_checkpoints=2", "output.export=False"))
    checkpoint = tmp_path / "checkpoints" / "step_000003"
    for asked, taken in ((range(2, 4), range(0)), (range(2, 6), range(4, 6)), (range(5, 9), range(5, 7))):
        coming, notes = preflight.find_profiled(asked, checkpoint, 6)
        assert list(coming) == list(taken)
        expected = [f"--profile {asked.start}:{asked.stop}: nothing to trace, 3 of 6 steps were taken before"]
        assert notes == ([] if taken else expected)
    assert len(lines_of(tmp_path)) == 6
    assert not (tmp_path / "profile").exists()


# -- refusing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("10",), "'10' is not A:B; 10:13 traces steps 10, 11 and 12"),
        (("a:b",), "'a:b' is not A:B; "),
        (("0:3",), "0:3 has no 1 <= A < B: steps count from 1, B is not included. Try 1:3"),
        (("5:5",), "Try 5:6"),
        (("7:3",), "Try 7:8"),
        (("10:13", "--check"), "--profile goes with a run, and --check starts none"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_steps_that_make_no_sense_exit_with_2_and_a_cure(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        launch.read_arguments(["--profile", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_steps_past_the_last_are_refused_before_the_folder_is_touched(tmp_path: Path) -> None:
    config = preflight.read_config(None, [*TINY, f"output.dir={tmp_path / 'run'}"], 1)
    with pytest.raises(ConfigError, match=r"--profile 7:9: step 7 is past the last, train\.steps=6\. Try 6:7\."):
        preflight.inspect(config, ALONE, profiled=range(7, 9))
    assert list(tmp_path.iterdir()) == []

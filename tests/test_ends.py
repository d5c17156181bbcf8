"""The ends of runs: by signals, with all that was done saved, and what they leave for whoever starts them again."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import launch
import parallel
from colonnade import process
from colonnade.rank_process import record_lost
from models.data import Loader
from parallel.checkpoint import checkpoint
from parallel.config import parse
from parallel.engine import stop_signals
from parallel.engine.context import Place, make_context, use
from parallel.engine.stop_signals import STOP_SIGNALS, StopSignals, catch_signals, code_of
from parallel.errors import ExitCode, NoRoomError
from parallel.watch.beat import Beat
from parallel.watch.launch_history import Decision, LaunchHistory, RunStart
from parallel.watch.progress import Progress
from tests.ending import NAME, Planned, assert_same_run, ended, lines
from tests.harness import run as run_on
from tests.patience import LIMIT, wait_until
from tests.tables import Row, rows
from training.attempt import resume_of
from training.config import read_config
from training.ended import Ended, EndRecord

ROOT = Path(__file__).parent.parent
STEPS = 6
SMALL = (
    "model.hidden_size=32",
    "model.ffn_dim=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "data.sequence_length=16",
    "data.validation_fraction=0.002",
    f"train.steps={STEPS}",
    "train.global_batch_size=8",
    "train.micro_batch_size=4",
    "train.timeout_seconds=5",
    "train.device=cpu",
    "output.eval_every=3",
    f"output.callbacks=('{NAME}',)",
)


def train(folder: Path, *assignments: str, resume: str | None = None) -> int:
    """Train in this process as the command does, and return the exit code."""
    arguments = ["--set", *SMALL, f"output.dir={folder}", *assignments]
    return launch.main(launch.read_arguments([*arguments, *(["--resume", resume] if resume else [])]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder, f"output.checkpoint_every={STEPS}") == 0
    return folder


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_run_that_a_signal_ends_goes_on_as_if_nothing_had_been(
    number: signal.Signals,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing was saved in an earlier version, here without `output.checkpoint_every`."""
    folder = tmp_path / "run"
    monkeypatch.setattr(os, "environ", os.environ | Planned(number).environment())
    assert train(folder) == code_of(number)
    line = f"{number.name}: saved {folder}/checkpoints/step_000004 after step 4; --resume auto goes on"
    assert capsys.readouterr().err == f"{line}\n"
    end = ended(folder)
    assert (end["code"], end["reason"], end["step"], end["phase"]) == (code_of(number), line, 4, "training")
    assert train(folder, f"output.checkpoint_every={STEPS}", resume="auto") == 0
    assert ended(folder)["code"] == ExitCode.DONE
    assert_same_run(folder, whole, last_step=STEPS)


def test_a_step_that_was_just_saved_is_not_saved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = parallel.Engine.save

    def count(engine: parallel.Engine, *arguments: object, **options: object) -> None:
        saved.append(engine.num_steps)
        save(engine, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(parallel.Engine, "save", count)
    monkeypatch.setattr(os, "environ", os.environ | Planned(signal.SIGTERM).environment())
    assert train(tmp_path / "run", "output.checkpoint_every=2") == ExitCode.TERMINATED
    assert saved == [2, 4]


def test_a_signal_ends_an_evaluation_which_the_resumed_run_makes_first(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, validation = tmp_path / "run", Loader.validation

    def interrupted(loader: Loader) -> object:
        for number, batch in enumerate(validation(loader)):
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "validation", interrupted)
        assert train(folder) == ExitCode.TERMINATED
    assert ended(folder)["step"] == 3
    assert [line["step"] for line in lines(folder)] == [1, 2]  # the third has its validation loss later
    assert train(folder, f"output.checkpoint_every={STEPS}", resume="auto") == 0
    assert_same_run(folder, whole, last_step=STEPS)


def test_a_signal_in_the_evaluation_after_a_step_that_was_left_out_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of that step is NaN. The checkpoint had it in its index, which nobody could read any more."""
    folder, step, validation = tmp_path / "run", parallel.Engine.train_step, Loader.validation

    def left_out(engine: parallel.Engine, batch: Any, **options: Any) -> object:
        result = step(engine, batch, **options)
        return replace(result, loss=math.nan, grad_norm=None, skipped=True) if engine.num_steps == 3 else result

    def interrupted(loader: Loader) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return validation(loader)

    monkeypatch.setattr(parallel.Engine, "train_step", left_out)
    with monkeypatch.context() as patch:
        patch.setattr(Loader, "validation", interrupted)
        assert train(folder) == ExitCode.TERMINATED
    assert train(folder, resume="auto") == 0
    assert [(line["step"], line["loss"] is None) for line in lines(folder)] == [(i, i == 3) for i in range(1, 7)]
    assert "validation_loss" in lines(folder)[2]


def test_a_step_that_was_evaluated_after_a_resume_is_reported_once_whatever_kills_that_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed run was killed before it had saved again; the next one kept the line that it had written, and wrote
    it a second time.
    """
    folder, validation = tmp_path / "run", Loader.validation

    def interrupted(loader: Loader) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return validation(loader)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "validation", interrupted)
        assert train(folder) == ExitCode.TERMINATED
    with monkeypatch.context() as patch:
        patch.setattr(parallel.Engine, "train_step", killed)
        with suppress(KeyboardInterrupt):
            train(folder, resume="auto")
    assert [line["step"] for line in lines(folder)] == [1, 2, 3]
    assert train(folder, f"output.checkpoint_every={STEPS}", resume="auto") == 0
    assert_same_run(folder, whole, last_step=STEPS)


def test_a_signal_before_the_first_step_saves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Loader.__init__

    def signalled(loader: Loader, *arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        made(loader, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Loader, "__init__", signalled)
    assert train(tmp_path / "run") == ExitCode.REQUEUED
    assert capsys.readouterr().err == "SIGUSR1: ended before the first step of this run; nothing is lost\n"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_second_signal_ends_at_once_and_one_within_a_second_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("parallel.engine.stop_signals.time.monotonic", lambda: now)
    asked: list[int] = []
    signals = StopSignals(asked.append)

    def code(number: int) -> object:
        try:
            signals.handle(number)
        except SystemExit as end:
            return end.code
        return None

    assert code(signal.SIGINT) is None
    now += 0.9
    assert code(signal.SIGINT) is None
    assert asked == [signal.SIGINT]
    now += 0.2
    assert code(signal.SIGTERM) == ExitCode.TERMINATED
    now += 5
    assert code(signal.SIGTERM) is None  # it ends already
    signals.tell(asked.append)
    assert asked == [signal.SIGINT, signal.SIGINT]


def test_a_second_signal_closes_and_removes_what_is_incomplete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first comes after step 3; the second, while its checkpoint is written."""
    monkeypatch.setattr(stop_signals, "SECONDS_OF_ONE", -1.0)
    monkeypatch.setattr(os, "environ", os.environ | Planned(signal.SIGINT).environment())

    def write(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(checkpoint, "write_sums", write)
    folder = tmp_path / "run"
    assert train(folder) == ExitCode.INTERRUPTED
    assert capsys.readouterr().err == "SIGINT: ended at once; nothing was saved\n"
    assert list((folder / "checkpoints").iterdir()) == []


def stopped_by_users_loop(rank: int, world: int) -> tuple[int | None, int | None]:
    use(make_context(parse({}, world_size=world, batches=False), Place(rank, world, rank, world)))
    engine, *_ = parallel.initialize(torch.nn.Linear(2, 1))
    found = []
    with catch_signals(engine):
        for _ in range(2):
            engine.backward(engine(torch.ones(1, 2)).sum())
            engine.step()
            found.append(engine.stop_signal)
            if rank == world - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    return found[0], found[1]


def test_a_users_own_loop_learns_of_a_signal_on_every_rank_after_the_next_step() -> None:
    assert run_on(stopped_by_users_loop, 2) == [(None, signal.SIGUSR1)] * 2


def test_nothing_is_installed_unasked() -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    StopSignals()
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


def test_the_codes_and_signals_that_are_known_without_torch_are_those_of_the_library() -> None:
    assert process.REFUSED == ExitCode.REFUSED
    assert process.STOP_SIGNALS == STOP_SIGNALS
    codes = {ExitCode.TERMINATED, ExitCode.REQUEUED, ExitCode.INTERRUPTED}
    assert {code_of(number) for number in STOP_SIGNALS} == codes
    assert {process.SIGNALLED + number for number in STOP_SIGNALS} == codes


# -- what an end leaves ------------------------------------------------------------------------------------------------


class FakeStore:
    """A store of one process, with what the history needs of torch's."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.get(key) for key in keys]

    def add(self, key: str, amount: int) -> int:
        raise NotImplementedError

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        if self.values.get(key, "") == expected:
            self.values[key] = value
        return self.get(key)


def test_a_later_attempt_learns_of_a_decision_and_the_same_one_does_not() -> None:
    store = FakeStore()
    LaunchHistory(store, "0").decide(ExitCode.TERMINATED, "SIGTERM: saved")
    assert LaunchHistory(store, "0").decision() is None  # torchrun's count is the same: it has started again by itself
    assert LaunchHistory(store, "1").decision() == Decision(143, "SIGTERM: saved")
    other = FakeStore()
    LaunchHistory(other, "0").decide(ExitCode.NOT_FINITE, "step 3")
    LaunchHistory(other, "0").decide(ExitCode.REFUSED, "later")
    assert LaunchHistory(other, "0").decision() is None  # a rank that starts late comes to it by itself
    assert LaunchHistory(other, "1").decision() == Decision(4, "step 3")
    assert LaunchHistory().decision() is None
    assert LaunchHistory().start() is None


def test_one_rank_alone_is_the_first_in_each_attempt() -> None:
    store = FakeStore()
    assert [LaunchHistory(store, "0").is_first("word", who) for who in ("1", "0", "1")] == [True, False, True]
    assert LaunchHistory(store, "1").is_first("word", "0")


def test_a_later_attempt_begins_at_its_own_checkpoint_and_else_as_the_first_one_did(tmp_path: Path) -> None:
    config = read_config(None, [*SMALL, f"output.dir={tmp_path / 'run'}"], 1)
    start = RunStart(str((tmp_path / "run").resolve()), resumed_from="/elsewhere/step_000002")
    saved = RunStart(start.folder, start.resumed_from, has_saved=True)
    assert resume_of(None, config, "auto") == "auto"
    assert resume_of(start, config, "auto") == "/elsewhere/step_000002"
    assert resume_of(RunStart(start.folder), config, "auto") is None  # what lay there before is not its own
    assert resume_of(saved, config, "/elsewhere/step_000002") == "auto"
    (tmp_path / "run/checkpoints/step_000004").mkdir(parents=True)
    assert resume_of(start, config, "auto") == "auto"  # saved, and killed before a note of that
    within = replace(start, resumed_from=f"{start.folder}/checkpoints/step_000002")
    assert resume_of(within, config, "auto") == within.resumed_from  # what lies there may be another run's
    assert resume_of(RunStart("/another/run", has_saved=True), config, None) is None


def test_the_record_of_an_end_is_whole_or_absent_and_a_full_disk_hides_nothing(tmp_path: Path) -> None:
    record = EndRecord()
    record.write(Ended.of_rank(1, "before the folder", 0, Progress()))
    assert list(tmp_path.iterdir()) == []
    record.begin(tmp_path, removes=True)
    record.write(Ended.of_lost(5, "rank 1 is lost", Beat(1, "b", step=3, action="a step")))
    assert ended(tmp_path) == dict(code=5, reason="rank 1 is lost", step=3, rank=1, host="b", phase="a step")
    (tmp_path / "ended.json").unlink()
    (tmp_path / "ended.json").mkdir()  # it cannot be replaced
    record.write(Ended.of_rank(1, "in vain", 0, Progress()))
    assert [path.name for path in tmp_path.iterdir()] == ["ended.json"]
    (tmp_path / "ended.json").rmdir()
    record.begin(tmp_path / "nowhere", removes=True)
    record.write(Ended.of_rank(1, "in vain", 0, Progress()))


def test_an_exception_is_one_line_that_names_the_log_with_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(loader: Loader, first: int) -> object:
        raise ZeroDivisionError("of a bug")

    monkeypatch.setattr(Loader, "training", fail)
    folder = tmp_path / "run"
    assert train(folder) == ExitCode.FAILED
    error = capsys.readouterr().err
    assert re.fullmatch(
        rf"rank 0: ZeroDivisionError: of a bug \({__file__}:\d+\)\. The traceback is in {folder}/logs/rank_0\.log\.\n",
        error,
    )
    assert "in fail" in (folder / "logs" / "rank_0.log").read_text()
    assert ended(folder)["code"] == ExitCode.FAILED


def test_a_run_that_begins_removes_the_record_of_the_run_before_only_if_it_touches_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train(folder, "output.checkpoint_every=3", "output.export=False") == 0
    assert train(folder, "train.seed=1", resume="auto") == ExitCode.REFUSED
    assert ended(folder)["code"] == ExitCode.DONE


@dataclass(frozen=True)
class Case:
    """A way to end a run of one process: a signal or exception of a callback, or an error of the loop."""

    assignments: tuple[str, ...] = ()
    plan: Planned | None = None
    error: Exception | None = None


CASES = {
    "0": Case(),
    "1": Case(error=ZeroDivisionError("of a bug")),
    "2": Case(("train.steps=0",)),
    "4": Case(("optimizer.lr=1e30",)),
    "5": Case(error=parallel.LostRankError("rank 1 on a host is lost")),
    "6": Case(error=NoRoomError("metrics.jsonl: no room on the disk")),
    "130": Case(plan=Planned(signal.SIGINT)),
    "138": Case(plan=Planned(signal.SIGUSR1)),
    "143": Case(plan=Planned(signal.SIGTERM)),
}
TABLE = rows("docs/faults.md", "How a run ends")


def test_each_exit_code_is_in_the_table() -> None:
    assert [row.what for row in TABLE] == list(CASES) == [str(code.value) for code in ExitCode]


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_a_run_ends_as_the_table_says(
    row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case, folder = CASES[row.what], tmp_path / "run"
    if case.plan is not None:
        monkeypatch.setattr(os, "environ", os.environ | case.plan.environment())
    if case.error is not None:
        training = Loader.training

        def fail(loader: Loader, first: int) -> object:
            assert case.error is not None
            if first:  # not before the first step, when no room is a refusal
                raise case.error
            return training(loader, first)

        monkeypatch.setattr(Loader, "training", fail)
    assert train(folder, "output.export=False", *case.assignments) == int(row.what)
    error = capsys.readouterr().err
    words = [word for word in re.findall(r"`([^`]+)`", row.answer) if "." not in word[:-1]]
    assert [word for word in words if word not in error] == []
    if row.what not in ("2", "5"):  # nothing was touched; ranks that are watched write it
        assert (ended(folder)["code"], ended(folder)["reason"]) == (int(row.what), error.strip() or "done")
        if case.error is not None:  # of a batch that was to be read ahead, within the step before
            assert (ended(folder)["phase"], ended(folder)["step"]) == ("reading a batch", 1)
    if row.what == "4":  # it was that of the callbacks, which are told of the step before the run ends
        assert ended(folder)["phase"] == "a train step"


def test_the_launcher_records_what_it_prints_in_place_of_what_a_rank_has_written(tmp_path: Path) -> None:
    """It printed that a signal had killed a rank; ended.json had another text, of the rank that had missed that one."""
    record = EndRecord()
    record.begin(tmp_path, removes=True)
    lost = Beat(1, "b", step=3, action="a train step")
    record.write(Ended.of_lost(5, "rank 1 ended without a word", replace(lost, step=4)))  # a beat may be a second old
    record_lost(RunStart(str(tmp_path)), 5, "rank 1 was killed by signal 9, SIGKILL", lost)
    assert (ended(tmp_path)["reason"], ended(tmp_path)["step"]) == ("rank 1 was killed by signal 9, SIGKILL", 4)
    record_lost(None, 5, "before the folder", lost)
    assert ended(tmp_path)["step"] == 4
    record_lost(RunStart(str(tmp_path)), 130, "", lost)
    assert ended(tmp_path)["reason"] == "SIGINT: ended at once; nothing was saved"


# -- whole runs of several processes -----------------------------------------------------------------------------------

TORCHRUN = (
    *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"),
    *("--rdzv-endpoint", "localhost:0", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"),
)
STARTS = {
    "nprocs": (sys.executable, "-m", "colonnade", "train", "--nprocs", "2"),
    "torchrun": (*TORCHRUN, "-m", "colonnade", "train"),
    "restarting": (*TORCHRUN, "--max-restarts", "2", "-m", "colonnade", "train"),
}


@dataclass(frozen=True)
class Done:
    """A run of two processes that has ended: its exit code, its lines of errors of ours, and its folder."""

    code: int
    errors: list[str]
    folder: Path


def play(how: str, folder: Path, *assignments: str, plan: Planned | None = None, resume: str | None = None) -> Done:
    """Train on two ranks, which end as it is planned."""
    settings = ["--set", *SMALL, f"train.steps={2 * STEPS}", f"output.dir={folder}", *assignments]
    command = [*STARTS[how], *settings, *(["--resume", resume] if resume else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= plan.environment() if plan else {}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    return Done(done.returncode, ours(done.stderr), folder)


def ours(errors: str) -> list[str]:
    """Return the lines of the errors that are not torchrun's own: its log, its traceback and its report."""
    own = re.compile(r"[WEI]\d{4} |\s|Traceback|torch\.|=+$|-+$|.* FAILED$|Failures:|Root Cause|\[\d+\]:|$")
    return [line for line in errors.splitlines() if not own.match(line)]


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of two processes that nothing has interrupted."""
    done = play("nprocs", tmp_path_factory.mktemp("two") / "run", "output.checkpoint_every=2")
    assert done.code == 0, done.errors
    return done.folder


@pytest.mark.slow
@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("how", ["nprocs", "torchrun"])
def test_a_signal_to_one_rank_ends_all_and_the_resumed_run_is_the_whole_one(
    how: str, number: signal.Signals, on_two: Path, tmp_path: Path
) -> None:
    done = play(how, tmp_path / "run", plan=Planned(number, rank=1))
    assert done.code == (code_of(number) if how == "nprocs" else 1)
    line = f"{number.name}: saved {done.folder}/checkpoints/step_000004 after step 4; --resume auto goes on"
    assert done.errors == [line]
    assert (ended(done.folder)["code"], ended(done.folder)["reason"]) == (code_of(number), line)
    again = play(how, tmp_path / "run", "output.checkpoint_every=2", resume="auto")
    assert (again.code, again.errors) == (0, [])
    assert_same_run(done.folder, on_two, last_step=2 * STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_whose_rank_is_killed_goes_on_in_its_own_folder(rank: int, on_two: Path, tmp_path: Path) -> None:
    """Ranks that were started again read addresses of the attempt before, and failed, in an earlier version."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "of another run").touch()
    plan = Planned(signal.SIGKILL, step=5, rank=rank)
    done = play("restarting", tmp_path / "run", "output.checkpoint_every=2", plan=plan)
    assert done.code == 0, done.errors
    assert len(done.errors) == 1
    assert f"rank {rank} on " in done.errors[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1"]
    assert_same_run(done.folder, on_two, last_step=2 * STEPS)
    assert ended(done.folder)["code"] == ExitCode.DONE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "assignments", "code"),
    [
        (None, ["optimizer.lr=1e30"], ExitCode.NOT_FINITE),
        (Planned(rank=1), [], ExitCode.FAILED),
        (Planned(signal.SIGUSR1, rank=1), [], ExitCode.REQUEUED),
    ],
    ids=["numbers that are not finite", "a callback's exception", "a signal"],
)
def test_a_run_that_ended_by_its_own_decision_is_not_started_again(
    plan: Planned | None, assignments: list[str], code: ExitCode, tmp_path: Path
) -> None:
    done = play("restarting", tmp_path / "run", *assignments, plan=plan)
    assert done.code == 1
    first, *later = done.errors
    assert later == [f"not started again, since the run ended by its own decision: {first}"] * 2
    assert ended(done.folder)["code"] == code
    assert len(lines(done.folder)) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("how", ["nprocs", "torchrun"])
def test_a_killed_rank_ends_the_run_with_one_line_and_a_record_that_names_it(how: str, tmp_path: Path) -> None:
    done = play(how, tmp_path / "run", plan=Planned(signal.SIGKILL, step=5, rank=1))
    assert done.code == (ExitCode.LOST if how == "nprocs" else 1)
    assert len(done.errors) == 1
    assert done.errors[0].startswith("rank 1 on ")
    assert (ended(done.folder)["code"], ended(done.folder)["rank"]) == (ExitCode.LOST, 1)
    assert not (done.folder / "checkpoints").exists()  # torchrun sends SIGTERM to the other rank: it saves nothing


@pytest.mark.slow
def test_a_second_signal_that_ends_blocked_ranks_is_in_the_record(tmp_path: Path) -> None:
    """Rank 1 is stopped, and rank 0 waits for it: no handler of theirs runs, and so the launcher writes it."""
    run, plan = tmp_path / "run", Planned(signal.SIGSTOP, rank=1)
    settings = [*SMALL, "train.timeout_seconds=60", f"output.dir={run}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **plan.environment()}
    command = [*STARTS["nprocs"], "--set", *settings]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert wait_until(lambda: (run / "metrics.jsonl").exists() and len(lines(run)) == 3)
        for _ in range(2):
            time.sleep(1.5 * stop_signals.SECONDS_OF_ONE)
            process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == ExitCode.TERMINATED
        text = "SIGTERM: ended at once; nothing was saved"
        assert process.stderr is not None
        assert process.stderr.read() == f"{text}\n"
    end = ended(run)
    assert (end["code"], end["reason"], end["rank"], end["step"]) == (ExitCode.TERMINATED, text, 0, 3)

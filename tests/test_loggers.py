"""Loggers: what a run logs is what metrics.jsonl has, and goes on where a resumed run goes on."""

import importlib
import importlib.util
import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import training.loggers
from parallel.errors import ConfigError
from tests.test_loop import TIMES, lines_of, prepared, run_of
from training import metrics
from training.run import run_job
from training.scalars import scalars_of
from training.wandb_logger import PROJECT, WandbLogger

SHORT = ("train.steps=4", "output.export=False", "output.checkpoint_every=2", "output.eval_every=2")


def test_the_scalars_of_a_line_are_its_numbers_by_name() -> None:
    line = {"step": 3, "loss": 2.5, "mfu": None, "skipped": True, "phases": {"forward": 0.25, "data": 0}}
    assert scalars_of(line) == {"loss": 2.5, "skipped": 1.0, "phases/forward": 0.25, "phases/data": 0.0}


# -- TensorBoard -------------------------------------------------------------------------------------------------------


def test_tensorboard_has_every_number_of_metrics_jsonl_and_a_resumed_run_replaces_its_steps(tmp_path: Path) -> None:
    """The event files are read back by TensorBoard's own reader. The second run has another learning rate."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = (*SHORT, "output.loggers=('tensorboard',)")
    run_job(prepared(tmp_path, *options, "train.steps=3"))
    before = lines_of(tmp_path)
    run_job(prepared(tmp_path, *options, "optimizer.lr=1e-2", resume="auto"))
    assert lines_of(tmp_path)[2]["grad_norm"] == before[2]["grad_norm"]
    assert lines_of(tmp_path)[2]["lr"] != before[2]["lr"]  # step 3 was taken twice, with two rates
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = list(metrics.read(tmp_path / "metrics.jsonl"))
    assert {"loss", "validation_loss", "lr", "grad_norm", "tokens_per_second", "peak_host_bytes"} <= {
        *events.Tags()["scalars"]
    }
    for name in events.Tags()["scalars"]:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(line["step"], scalars_of(line)[name]) for line in lines if name in scalars_of(line)]
        assert [step for step, _ in found] == [step for step, _ in expected], name
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)  # fp32


# -- Weights & Biases --------------------------------------------------------------------------------------------------


class FakeError(Exception):
    """Stands for wandb.Error."""


class FakeWandb(ModuleType):
    """A module with the few names of wandb that are used, which keeps what it is told."""

    def __init__(self, *, reachable: bool = True, logs: bool = True) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.exit_codes: list[int] = []
        self.reachable, self.logs = reachable, logs
        self.num_teardowns = 0
        self.Error, self.Settings = FakeError, lambda **settings: SimpleNamespace(project=None, **settings)

    def setup(self, settings: Any) -> Any:
        return SimpleNamespace(settings=settings)

    def teardown(self) -> None:
        self.num_teardowns += 1

    def init(self, **options: Any) -> Any:
        self.begun.append(options)
        if not self.reachable and options["mode"] != "offline":
            raise FakeError("no route to host\nwhile retrying")
        offline = options["mode"] == "offline"
        return SimpleNamespace(
            url="https://it", offline=offline, dir=f"{options['dir']}/wandb/1/files", log=self.log, finish=self.finish
        )

    def log(self, values: dict[str, float], step: int) -> None:
        if not self.logs:
            raise FakeError("the service has ended")
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.exit_codes.append(exit_code)


def test_wandb_is_given_each_step_and_the_config_and_a_resumed_run_has_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    options = (*SHORT, "output.loggers=('wandb',)")
    run_job(prepared(tmp_path / "run", *options, "train.steps=2"))
    run_job(prepared(tmp_path / "run", *options, resume="auto"))
    run_job(prepared(tmp_path / "other", *options))
    lines = [scalars_of(line) for line in metrics.read(tmp_path / "run" / "metrics.jsonl")]
    assert fake.logged[:4] == list(enumerate(lines, 1))
    first, second, other = fake.begun
    assert first["id"] == second["id"] == (tmp_path / "run" / "wandb" / "run_id").read_text().strip()
    assert other["id"] != first["id"]
    assert (first["resume"], first["project"], first["name"]) == ("allow", PROJECT, "run")
    assert first["dir"] == tmp_path / "run"
    assert first["config"]["train"]["steps"] == 2
    assert (first["settings"].silent, first["settings"].console) == (True, "off")
    assert fake.exit_codes == [0, 0, 0]
    assert "wandb: https://it\n" in (shown := capsys.readouterr().out)
    assert f"wandb {tmp_path}/run/wandb " in " ".join(shown.split())


def test_a_server_that_cannot_be_reached_is_said_and_the_run_is_logged_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb(reachable=False))
    run_job(prepared(tmp_path, *SHORT, "output.loggers=('wandb',)"))
    assert [options["mode"] for options in fake.begun] == [None, "offline"]
    assert (len(fake.logged), fake.num_teardowns) == (4, 1)
    shown = capsys.readouterr().out
    assert "wandb: no route to host. The run is logged offline, for `wandb sync` to upload.\n" in shown
    assert f"wandb: {tmp_path}/wandb/1\n" in shown


def test_a_run_goes_on_where_wandb_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(logs=False))
    run_job(prepared(tmp_path, *SHORT, "output.loggers=('wandb',)"))
    assert len(lines_of(tmp_path)) == 4
    assert capsys.readouterr().out.count("wandb: the service has ended. Nothing more is logged there.\n") == 1


def test_a_run_that_ends_by_an_error_is_a_failed_one_for_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    logger = WandbLogger()
    logger.on_start(run_of(tmp_path))
    logger.on_end(KeyboardInterrupt())
    assert fake.exit_codes == [1]


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format, which wandb's files have after seven bytes of their own.

    A block of 32 KiB has pieces of records, each with a checksum of 4 bytes, its length in 2, and its kind in 1: 1 a
    whole record, 2 the first piece, 3 one in the middle, 4 the last. What is left of a block is less than such a head.
    """
    record, place = b"", 7
    while place < len(content):
        if (left := -place % 2**15) < 7 and left:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.slow
def test_wandbs_offline_folder_has_the_run_and_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The files of the run are read with wandb's own protocol: they have the scalars of each step, and the config."""
    wandb = pytest.importorskip("wandb")
    records = importlib.import_module("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = (*SHORT, "output.loggers=('wandb',)")
    run_job(prepared(tmp_path, *options, "train.steps=2"))
    run_job(prepared(tmp_path, *options, resume="auto"))
    wandb.teardown()
    shown = capfd.readouterr()
    assert "wandb:" not in shown.err
    assert all(str(tmp_path) in line for line in shown.out.splitlines() if "wandb:" in line)
    id = (tmp_path / "wandb" / "run_id").read_text().strip()
    logged: dict[int, dict[str, float]] = {}
    configs = []
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{id}/run-{id}.wandb"))
    assert len(files) == 2
    for file in files:
        for data in leveldb_records(file.read_bytes()):
            record = records.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                configs.append({item.key: json.loads(item.value_json) for item in record.run.config.update})
            if record.WhichOneof("record_type") == "history":
                pairs = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                logged[int(pairs["_step"])] = pairs
    lines = {line["step"]: scalars_of(line) for line in metrics.read(tmp_path / "metrics.jsonl")}
    assert logged.keys() == lines.keys()
    for step, line in lines.items():
        assert {key: logged[step][key] for key in line if key not in TIMES} == pytest.approx(
            {key: value for key, value in line.items() if key not in TIMES}
        )
    assert configs[0]["train"]["steps"] == 2


# -- packages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_whose_package_is_missing_is_refused_with_the_extra(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the package's name in the working directory, as runs of wandb leave, is not the package."""
    folder = importlib.util.spec_from_file_location(name, None)
    for spec in (None, folder):
        monkeypatch.setattr(training.loggers, "find_spec", lambda name, found=spec: found)
        with pytest.raises(ConfigError) as caught:
            prepared(tmp_path / "run", f"output.loggers=('{name}',)")
        assert str(caught.value) == (
            f"output.loggers: {name!r} needs the package {name}, which is not installed: pip install {name}."
            " Or leave it out."
        )
    assert not (tmp_path / "run").exists()

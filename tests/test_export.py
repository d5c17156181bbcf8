"""`colonnade export` writes what the run's own export is, byte for byte, from a checkpoint of any layout."""

import json
import shutil
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from colonnade import cli
from colonnade.export import DTYPES as CHOICES
from models import hf
from parallel.checkpoint import checkpoint, hf_folder
from parallel.checkpoint.tensor_file import Entry, write_tensors
from parallel.engine.context import DTYPES, Place
from parallel.layout.layout import Piece
from parallel.mesh.mesh import ALONE
from tests.checkpoints import seal
from tests.harness import run
from tests.test_loop import prepared
from training.export import find_saved_model
from training.run import run_job

SAVES = ("train.steps=2", "output.checkpoint_every=2")


@pytest.fixture(autouse=True)
def _leaves_signals_alone() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def export(*arguments: object) -> int:
    return cli.main(["export", *map(str, arguments)])


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that has a checkpoint after its second, last step, and one before it."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    run_job(prepared(folder, "train.steps=2", "output.checkpoint_every=1"))
    return folder


@pytest.fixture
def saved(first: Path, tmp_path: Path) -> Path:
    """Return a copy of that folder, in which files may be damaged."""
    return Path(shutil.copytree(first, tmp_path / "saved"))


# -- what is written ---------------------------------------------------------------------------------------------------


def train(rank: int, world_size: int, folder: Path, assignments: tuple[str, ...]) -> None:
    job = prepared(folder, *SAVES, *assignments, place=Place(rank, world_size, rank, world_size))
    dist.barrier()  # every rank is connected before any of them writes
    run_job(job)


LAYOUTS = {
    "pp2-zero1": (4, ("parallel.pipeline=2", "zero.stage=1", "train.precision=bf16")),
    "pp2-2d4": (8, ("parallel.pipeline=2", "parallel.tensor={'mode': '2d', 'size': 4}")),
    "2.5d4": (4, ("parallel.tensor={'mode': '2.5d', 'size': 4}", "output.export_dtype=fp16")),
    "1d2-llama": (2, ("parallel.tensor={'mode': '1d', 'size': 2}", "model={'name': 'llama-tiny'}")),
    "zero3": (2, ("zero.stage=3", "output.export_dtype=bf16", "zero.tensor_placement_policy=cpu")),
    "ring2-fp64": (2, ("parallel.context=2", "train.precision=fp64", "model.dropout=0")),
}


@pytest.mark.parametrize(
    "layout", [name if name == "1d2-llama" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_an_export_of_a_checkpoint_is_the_runs_own_in_every_layout(layout: str, tmp_path: Path) -> None:
    world_size, assignments = LAYOUTS[layout]
    run(train, world_size, tmp_path / "run", assignments)
    assert export(tmp_path / "run", "--to", tmp_path / "new/hf") == 0
    assert contents(tmp_path / "new/hf") == contents(tmp_path / "run/export")


def test_a_run_is_its_newest_checkpoint_and_an_earlier_one_can_be_named(first: Path, tmp_path: Path) -> None:
    one, two = (first / "checkpoints" / f"step_00000{step}" for step in (1, 2))
    for target, name in dict(run=first, newest=two, earlier=one).items():
        assert export(name, "--to", tmp_path / target) == 0
    own = contents(first / "export")
    assert contents(tmp_path / "run") == contents(tmp_path / "newest") == own
    earlier = contents(tmp_path / "earlier")
    assert earlier.keys() == own.keys()
    assert [name for name in own if own[name] != earlier[name]] == ["model.safetensors"]


def test_tokenizer_template_and_generation_config_come_along_and_what_is_gone_is_named(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(first / "export", tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<unk>"}))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "top_k": 5}))
    paths = (f"model.path={model}", f"data.tokenizer={model}", "output.export_dtype=bf16")
    run_job(prepared(tmp_path / "run", *SAVES, *paths))
    assert export(tmp_path / "run", "--to", tmp_path / "hf") == 0
    found = contents(tmp_path / "hf")
    assert found == contents(tmp_path / "run/export")
    assert found.keys() > {"chat_template.jinja", "generation_config.json", "tokenizer.json"}
    assert json.loads(found["generation_config.json"]) == {"eos_token_id": [3, 7], "top_k": 5}

    model.rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert export(tmp_path / "run", "--to", tmp_path / "hf") == 0
    shown = capsys.readouterr().out
    assert f"no tokenizer: data.tokenizer: {model}" in shown
    assert f"no generation_config.json: model.path: {model} is not a directory" in shown
    assert contents(tmp_path / "hf").keys() == {"config.json", "model.safetensors"}


def test_the_dtype_of_the_command_is_one_of_the_configs_and_casts_as_the_run_does(first: Path, tmp_path: Path) -> None:
    assert set(CHOICES) == set(DTYPES)
    assert export(first, "--to", tmp_path / "bf16", "--dtype", "bf16") == 0
    with (
        safe_open(first / "export/model.safetensors", "pt") as own,
        safe_open(tmp_path / "bf16/model.safetensors", "pt") as found,
    ):
        names = set(own.keys())
        assert names == set(found.keys())
        for name in names:
            assert torch.equal(found.get_tensor(name), own.get_tensor(name).to(torch.bfloat16))
    assert json.loads((tmp_path / "bf16/config.json").read_text())["dtype"] == "bfloat16"


def enlarged(folder: Path) -> None:
    """Multiply what a checkpoint holds by 10^7, which fp16 cannot hold."""
    file = folder / "rank_00000.safetensors"
    with safe_open(file, "pt") as content:
        tensors = {name: content.get_tensor(name) * 1e7 for name in content.offset_keys()}
    write_tensors(file, [Entry(name, tuple(x.shape), x.dtype) for name, x in tensors.items()], tensors.values())
    seal(folder)


def test_a_value_too_large_is_refused_for_a_dtype_that_was_asked_for_and_else_exported_in_a_wider_one(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = saved / "checkpoints/step_000002"
    enlarged(step)
    assert export(step, "--to", tmp_path / "hf", "--dtype", "fp16") == 2
    shown = capsys.readouterr().err
    assert shown.startswith("--dtype: fp16: model.decoder.")
    assert "which torch.float16 cannot hold" in shown
    assert not (tmp_path / "hf").exists()
    index = json.loads((step / "checkpoint.json").read_text())
    index["metadata"]["config"]["output"]["export_dtype"] = "fp16"
    (step / "checkpoint.json").write_text(json.dumps(index))
    seal(step)
    assert export(step, "--to", tmp_path / "hf") == 0
    assert "The export is fp32" in capsys.readouterr().out


def test_one_tensor_of_a_checkpoint_is_in_memory_at_a_time(first: Path) -> None:
    """The last tensor that was yielded and the one that is being read are alive, and no other."""
    alive: list[weakref.ref[torch.Tensor]] = []
    for piece in find_saved_model(str(first)).tensors():
        alive.append(weakref.ref(piece.data))
        assert sum(reference() is not None for reference in alive) <= 2
    assert len(alive) > 10


# -- what is refused ---------------------------------------------------------------------------------------------------


def cut(step: Path) -> str:
    (step / "rank_00000.safetensors").write_bytes((step / "rank_00000.safetensors").read_bytes()[:-1])
    return "rank_00000.safetensors is damaged: it has "


def change_a_byte(step: Path) -> str:
    content = bytearray((step / "rank_00000.safetensors").read_bytes())
    content[-1] ^= 1
    (step / "rank_00000.safetensors").write_bytes(content)
    return "rank_00000.safetensors is damaged, or another file: its bytes are not those that were written. Try "


def remove_a_file(step: Path) -> str:
    (step / "rank_00000.safetensors").unlink()
    return "rank_00000.safetensors is missing."


def lose_the_list_of_files(step: Path) -> str:
    (step / "checkpoint.json").write_text('{"metadata": {}, "files": [], "tensors": {}}')
    seal(step)
    return "checkpoint.json is damaged: 'files' is []"


def break_the_index(step: Path) -> str:
    (step / "checkpoint.json").write_text('{"metadata": 1}')
    return "checkpoint.json is damaged"


def save_by_a_loop_of_ones_own(step: Path) -> str:
    checkpoint.save(step, [], metadata={"format": 2}, axis=ALONE, keep=9)
    return "was saved by a loop of your own (engine.save_checkpoint)"


def save_by_another_program(step: Path) -> str:
    checkpoint.save(step, [], metadata={"step": 2}, axis=ALONE, keep=9)
    return "is not a checkpoint of this program"


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        change_a_byte,
        remove_a_file,
        lose_the_list_of_files,
        break_the_index,
        save_by_a_loop_of_ones_own,
        save_by_another_program,
    ],
)
def test_a_checkpoint_that_cannot_be_exported_is_refused_by_name(
    damage: Callable[[Path], str], saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = saved / "checkpoints/step_000002"
    words = damage(step)
    assert export(step, "--to", tmp_path / "hf") == 2
    shown = capsys.readouterr()
    assert (str(step) in shown.err, words in shown.err, shown.out) == (True, True, ""), shown
    assert ("of this program" in shown.err) == ("of this program" in words), "once every damage was called that, too"
    assert not (tmp_path / "hf").exists()


def of_a_user(target: Path) -> str:
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    return "is not empty, and notes.txt in it is no file of an earlier export"


def of_another_program(target: Path) -> str:
    """A model that was downloaded, say, has files of the same names."""
    target.mkdir()
    (target / "config.json").write_text("{}")
    header = b'{"__metadata__": {"format": "pt"}}'
    (target / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return "is not empty, and config.json in it is no file of an earlier export"


def of_an_export_and_a_user(target: Path) -> str:
    an_export(target)
    (target / "train.py").write_text("mine")
    return "is not empty, and train.py in it is no file of an earlier export"


def an_export(target: Path) -> None:
    target.mkdir()
    write_tensors(target / "model.safetensors", [], [])


def of_an_export_and_a_folder(target: Path) -> str:
    an_export(target)
    (target / "additional_chat_templates").mkdir()
    (target / "additional_chat_templates/notes.txt").write_text("mine")
    return "is not empty, and additional_chat_templates/notes.txt in it is no file of an earlier export"


def a_file(target: Path) -> str:
    target.write_text("mine")
    return "is not a folder"


@pytest.mark.parametrize(
    "make", [of_a_user, of_another_program, of_an_export_and_a_user, of_an_export_and_a_folder, a_file]
)
def test_a_target_that_is_no_earlier_export_is_refused_and_stays(
    make: Callable[[Path], str], first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    words = make(target)
    before = contents(tmp_path)
    assert export(first, "--to", target) == 2
    shown = capsys.readouterr().err
    assert (shown.startswith(f"--to: {target}"), words in shown) == (True, True), shown
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "is not a directory"), ("", "holds no checkpoint"), ("in", "lies in the checkpoint")],
)
def test_a_wrong_path_is_refused(
    name: str, words: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside = saved / "checkpoints/step_000002/hf"
    arguments = (saved, inside) if name == "in" else (tmp_path / name, tmp_path / "hf")
    assert export(arguments[0], "--to", arguments[1]) == 2
    assert words in capsys.readouterr().err
    assert not inside.exists()


def test_an_empty_folder_stays_the_one_that_it_is(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who is in the folder once saw nothing in it: it had been replaced by another one of its name."""
    monkeypatch.chdir(tmp_path)
    assert export(first, "--to", ".") == 0
    assert contents(Path()) == contents(first / "export")


def test_a_folder_named_auto_is_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export("auto", "--to", tmp_path / "hf") == 2
    assert "auto is not a directory" in capsys.readouterr().err


def test_several_processes_of_torchrun_are_refused(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as ended:
        export(first, "--to", tmp_path / "hf")
    assert ended.value.code == 2
    assert "one process writes an export: start this without torchrun" in capsys.readouterr().err


def test_a_write_that_fails_ends_the_export_without_reading_the_rest(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All other tensors of the checkpoint were once read after the disk was full, or after Ctrl-C."""
    read = []
    whole = checkpoint.whole_tensors

    def counted(*arguments: Any) -> Iterator[Piece]:
        for piece in whole(*arguments):
            read.append(piece.name)
            yield piece

    def fail(file: Path, entries: object, tensors: Iterator[torch.Tensor]) -> None:
        next(tensors)
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(checkpoint, "whole_tensors", counted)
    monkeypatch.setattr(hf_folder, "write_tensors", fail)
    assert export(first, "--to", tmp_path / "hf") == 2
    assert len(read) == 1


def test_an_export_that_fails_leaves_the_earlier_one_and_nothing_else(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(first, "--to", tmp_path / "hf") == 0
    before = contents(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device", "config.json")

    monkeypatch.setattr(hf, "_write_configs", fail)
    assert export(first / "checkpoints/step_000001", "--to", tmp_path / "hf") == 2
    assert "config.json: No space left on device" in capsys.readouterr().err
    assert contents(tmp_path) == before

"""Hostile files of every kind that a user can name are refused in seconds, by their names, in one line.

Nothing in them is executed, and no more than a megabyte above their own size is allocated.
"""

import gzip
import json
import os
import shutil
import signal
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colonnade import cli
from models.tokenizer import load_tokenizer
from tests.patience import patient
from tests.test_loop import TINY, prepared
from training.run import run_job

pytestmark = pytest.mark.usefixtures("_leaves_signals_alone")

MEBIBYTE = 2**20
SECONDS = 2.0
TEXT = "It is a text of some words, and there are enough of them to train on.\n" * 40


@pytest.fixture
def _leaves_signals_alone() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a run, whose export is a model, and with data of every kind."""
    import datasets  # type: ignore[import-untyped]
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    root = tmp_path_factory.mktemp("base")
    (data := root / "data").mkdir()
    (data / "a.txt").write_text(TEXT)
    keys = "train.steps=1", "output.checkpoint_every=1", f"data.path={data}/a.txt", "data.validation_fraction=0"
    run_job(prepared(root / "run", *keys))
    model = Path(shutil.move(root / "run/export", root / "model"))
    (model / "generation_config.json").write_text("{}")
    (model / "special_tokens_map.json").write_text("{}")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool_use.jinja").write_text("{{ messages }}")
    lines = "".join(json.dumps({"text": TEXT}) + "\n" for _ in range(4))
    (data / "a.jsonl").write_text(lines)
    chat = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "I am here. " * 9}]}
    (data / "chat.jsonl").write_text((json.dumps(chat) + "\n") * 4)
    (data / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.table({"text": [TEXT] * 4}), data / "a.parquet")
    ids = np.resize(load_tokenizer("bytes").encode(TEXT), 4000).astype(np.uint16)
    ids.tofile(data / "a.bin")
    np.save(data / "a.npy", ids)
    datasets.Dataset.from_dict({"text": [TEXT] * 4}).save_to_disk(data / "saved")
    (data / "texts").mkdir()
    (data / "texts/a.txt").write_text(TEXT)
    return root


@pytest.fixture
def root(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the folder, in which files may be replaced, with a cache of its own."""
    monkeypatch.setenv("COLONNADE_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(base, tmp_path / "root", symlinks=True))


def with_keys(*assignments: str) -> Callable[[Path], list[str]]:
    """Return a command that checks a small run with these keys, in which {} is the folder."""

    def command(root: Path) -> list[str]:
        keys = [f"output.dir={root}/new", "data.path={}/data/a.txt", "data.validation_fraction=0", *assignments]
        return ["check", "--set", *TINY, *(key.format(root) for key in keys)]

    return command


def words_of(*words: str) -> Callable[[Path], list[str]]:
    """Return a command of these words, in which {} is the folder."""
    return lambda root: [word.format(root) for word in words]


def resume(root: Path) -> list[str]:
    keys = ["data.validation_fraction=0", "train.steps=2", f"output.dir={root}/run", f"data.path={root}/data/a.txt"]
    return ["train", "--set", *TINY, *keys, "--resume", f"{root}/run/checkpoints/step_000001"]


SMALL = "data.sequence_length=16"
MODEL = with_keys("model.path={}/model")
CHAT = with_keys("model.path={}/model", "data.tokenizer={}/model", "data.path={}/data/chat.jsonl")
TOKENIZER = with_keys("data.tokenizer={}/model", "data.path={}/data/a.txt")
GENERATE = words_of("generate", "{}/model", "--prompt", "It", "--tokens", "1")
EXPORT = words_of("export", "{}/run", "--to", "{}/hf")
TEXTS = with_keys("data.path={}/data/texts")


def data(name: str) -> Callable[[Path], list[str]]:
    return with_keys(f"data.path={{}}/data/{name}")


READERS: dict[str, tuple[Callable[[Path], list[str]], ...]] = {
    "config.py": (words_of("check", "--config", "{}/config.py"),),
    "config.json": (words_of("check", "--config", "{}/config.json"),),
    "config": (words_of("check", "--config", "{}/config"),),
    "model/config.json": (MODEL, GENERATE),
    "model/model.safetensors": (MODEL, GENERATE),
    "model/generation_config.json": (MODEL, GENERATE),
    "model/tokenizer.json": (TOKENIZER, GENERATE),
    "model/tokenizer_config.json": (TOKENIZER,),
    "model/special_tokens_map.json": (TOKENIZER,),
    "model/chat_template.jinja": (CHAT,),
    "model/additional_chat_templates/tool_use.jinja": (CHAT,),
    "data/a.txt": (data("a.txt"), with_keys("data.validation_path={}/data/a.txt")),
    "data/a.jsonl": (data("a.jsonl"),),
    "data/a.jsonl.gz": (data("a.jsonl.gz"),),
    "data/a.parquet": (data("a.parquet"),),
    "data/a.bin": (data("a.bin"),),
    "data/a.npy": (data("a.npy"),),
    "data/texts/a.txt": (TEXTS,),
    "data/saved/state.json": (data("saved"),),
    "data/saved/dataset_info.json": (data("saved"),),
    "data/saved/data-00000-of-00001.arrow": (data("saved"),),
    "prompts.txt": (words_of("generate", "{}/model", "--prompts", "{}/prompts.txt"),),
    "prompts.jsonl": (words_of("generate", "{}/model", "--prompts", "{}/prompts.jsonl"),),
    "run/.lock": (resume,),
    "run/metrics.jsonl": (resume,),
    "run/checkpoints/step_000001/checkpoint.json": (resume, EXPORT, words_of("generate", "{}/run", "--prompt", "It")),
    "run/checkpoints/step_000001/rank_00000.safetensors": (resume, EXPORT),
}
"""Files that are read, and commands that read them."""


def make_socket(file: Path) -> None:
    before = Path.cwd()
    os.chdir(file.parent)  # the path of a socket has at most 107 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(file.name)
    finally:
        os.chdir(before)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a link to a device": lambda file: file.symlink_to("/dev/zero"),
    "a socket": make_socket,
    "a link to itself": lambda file: file.symlink_to(file.name),
    "a folder": Path.mkdir,
    "a link to nothing": lambda file: file.symlink_to("nowhere"),
}
FIRST = ("a pipe", "a link to a device")


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the line with which a command refuses its files, in time and without more memory than it may take."""
    tracemalloc.start()
    began = time.perf_counter()
    try:
        code = cli.main(arguments)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    seconds = time.perf_counter() - began
    text = capsys.readouterr().err.strip()
    assert code == 2, text
    assert len(text.splitlines()) == 1, text
    assert seconds < patient(SECONDS), seconds
    assert peak < 2 * MEBIBYTE, peak
    return text


def cases() -> Iterator[Any]:
    for file, commands in READERS.items():
        for special in SPECIAL:
            for i, command in enumerate(commands):
                marks = [] if special in FIRST else [pytest.mark.slow]
                yield pytest.param(file, special, command, id=f"{file}-{special}-{i}", marks=marks)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(("file", "special", "command"), cases())
def test_what_is_no_regular_file_is_refused_by_its_name(
    file: str, special: str, command: Any, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = root / file
    place.unlink(missing_ok=True)
    SPECIAL[special](place)
    text = refusal(command(root), capsys)
    is_named = special != "a folder" and place.name != "checkpoint.json"  # without an index it is no checkpoint
    assert str(place if is_named else root / place.relative_to(root).parts[0]) in text

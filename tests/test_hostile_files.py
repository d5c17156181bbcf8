"""Hostile files of every kind that a user can name are refused in seconds, by their names, in one line.

Nothing in them is executed, and no more than a megabyte above their own size is allocated.
"""

import gzip
import json
import os
import pickle
import shutil
import signal
import socket
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from colonnade import cli
from models.chat import load_chat_template
from models.tokenizer import load_tokenizer
from tests.patience import patient
from tests.tables import rows
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
    assert load_chat_template(str(model)) is not None  # what is imported on a first use is no file's
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
FIRST = ("a pipe",)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the line with which a command refuses its files, in time and without more memory than it may take."""
    before = resident("VmRSS", reset=True)
    tracemalloc.start()
    began = time.process_time()  # a wait has the test's own limit
    try:
        code = cli.main(arguments)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    seconds = time.process_time() - began
    text = capsys.readouterr().err.strip()
    assert code == 2, text
    assert len(text.splitlines()) == 1, text
    assert seconds < patient(SECONDS), seconds
    assert peak < 2 * MEBIBYTE, peak
    assert resident("VmHWM") < before + 8 * MEBIBYTE  # also what tracemalloc does not see
    return text


def resident(field: str, *, reset: bool = False) -> int:
    """Return the memory that this process has resident, or the most since it was reset, in bytes."""
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # a machine that cannot tell
            return 1 << 60
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def cases() -> Iterator[Any]:
    for file, commands in READERS.items():
        for special in SPECIAL:
            for i, command in enumerate(commands):
                marks = [] if special in FIRST else [pytest.mark.slow]
                yield pytest.param(file, special, command, id=f"{file}-{special}-{i}", marks=marks)


@pytest.mark.timeout(100)
@pytest.mark.parametrize(("file", "special", "command"), list(cases()))
def test_what_is_no_regular_file_is_refused_by_its_name(
    file: str, special: str, command: Any, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = root / file
    place.unlink(missing_ok=True)
    SPECIAL[special](place)
    text = refusal(command(root), capsys)
    is_named = special != "a folder" and place.name != "checkpoint.json"  # without an index it is no checkpoint
    assert str(place if is_named else root / place.relative_to(root).parts[0]) in text


# -- what is in a file -------------------------------------------------------------------------------------------------


class Marker:
    """The mark that a pickle makes when it is read: a file, by which it is noticed."""

    def __init__(self, root: Path) -> None:
        self.file = root / "MARKER"

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def replace(name: str, content: bytes | str) -> Callable[[Path], None]:
    """Return what writes a file of the folder anew."""
    return lambda root: _write(root / name, content)


def _write(file: Path, content: bytes | str) -> None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def pickled(name: str) -> Callable[[Path], None]:
    """Return what writes a pickle in place of a file, after taking out the weights that would be preferred to it."""

    def plant(root: Path) -> None:
        if name == "model/pytorch_model.bin":
            (root / "model/model.safetensors").unlink()
        (root / name).write_bytes(pickle.dumps(Marker(root)))

    return plant


def objects(root: Path) -> None:
    """Save an array of objects, which numpy unpickles if it is asked to."""
    np.save(root / "data/a.npy", np.array([Marker(root)], dtype=object), allow_pickle=True)


def safetensors(header: Any, length: int | None = None) -> bytes:
    """Return a safetensors file with this header, which says that it is so long, and 8 bytes of data."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(8)


def tensor(**changes: Any) -> bytes:
    return safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes})


def changed_weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Return what saves the final norm's weight in another form."""

    def plant(root: Path) -> None:
        stored = load_file(root / "model/model.safetensors")
        stored[NORM] = change(stored[NORM])
        save_file(stored, root / "model/model.safetensors", metadata={"format": "pt"})

    return plant


def index_of(shard: str) -> Callable[[Path], None]:
    """Return what names a shard in the index of the weights."""

    def plant(root: Path) -> None:
        (root / "model/model.safetensors").rename(root / "outside.safetensors")
        (root / "model/model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": shard.format(root=root)}})
        )

    return plant


def npy(header: str, length: int | None = None) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\2\0" + struct.pack("<I", len(text) if length is None else length) + text + bytes(64)


def long_header(root: Path) -> None:
    """Write an array whose header says that it has 2 GiB, in a file that is as long and takes no room."""
    (root / "data/a.npy").write_bytes(npy("{", 2**31))
    os.truncate(root / "data/a.npy", 2**32)


def bomb(line: bytes) -> Callable[[Path], None]:
    """Return what packs 200 MB of a line, after its beginning, to 200 KB."""

    def plant(root: Path) -> None:
        with gzip.open(root / "data/a.jsonl.gz", "wb", compresslevel=1) as file:
            file.write(line[:-1])
            for _ in range(200):
                file.write(line[-1:] * 1_000_000)

    return plant


def dataset_with(**changes: Any) -> Callable[[Path], None]:
    """Return what changes the description of a saved dataset."""

    def plant(root: Path) -> None:
        file = root / "data/saved/state.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return plant


def pickled_type(root: Path) -> None:
    """Save a table whose type is Python's, as older versions of pyarrow unpickled it."""
    import pyarrow as pa

    metadata = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(Marker(root)),
    }
    table = pa.table([pa.array([TEXT] * 4)], schema=pa.schema([pa.field("other", pa.string(), metadata=metadata)]))
    file = str(root / "data/saved/data-00000-of-00001.arrow")
    with pa.OSFile(file, "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)


def sparse(name: str) -> Callable[[Path], None]:
    """Return what makes a file of a TiB, which takes no room."""

    def plant(root: Path) -> None:
        (root / name).touch()
        os.truncate(root / name, 2**40)

    return plant


def endless(root: Path) -> list[str]:
    """Return a command whose config is a device without end, as a shell opens it for a process."""
    return ["check", "--config", f"/dev/fd/{os.open('/dev/zero', os.O_RDONLY)}"]


DEEP = "[" * 100_000
NORM = "model.decoder.final_layer_norm.weight"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ARRAY = "{{'descr': '{}', 'fortran_order': False, 'shape': {}, }}"
CONFIG_JSON = words_of("check", "--config", "{}/config.json")
PROMPTS = words_of("generate", "{}/model", "--prompts", "{}/prompts.txt")

HOSTILE: dict[str, tuple[Callable[[Path], object], Callable[[Path], list[str]], str]] = {
    "a config without end": (lambda root: None, endless, "more than the 1.00 MiB"),
    "a config of a TiB": (sparse("config.py"), words_of("check", "--config", "{}/config.py"), "1024.00 GiB, more than"),
    "a config that is deep": (replace("config.json", DEEP), CONFIG_JSON, "nested too deep"),
    "a config with a key twice": (replace("config.json", '{"train": {}, "train": {}}'), CONFIG_JSON, "'train' twice"),
    "a config with NaN": (replace("config.json", '{"train": {"lr": NaN}}'), CONFIG_JSON, "NaN"),
    "prompts of a TiB": (sparse("prompts.txt"), PROMPTS, "1024.00 GiB, more than"),
    "a model's config that is deep": (replace("model/config.json", DEEP), MODEL, "nested too deep"),
    "a model's config of a TiB": (sparse("model/config.json"), GENERATE, "1024.00 GiB, more than"),
    "a number of 100,000 digits": (replace("model/config.json", '{"vocab_size": 1' + "0" * 10**5), MODEL, "not JSON"),
    "a tokenizer that is deep": (replace("model/tokenizer.json", DEEP), TOKENIZER, "is not a tokenizer.json"),
    "a tokenizer of a TiB": (sparse("model/tokenizer.json"), TOKENIZER, "1024.00 GiB, more than"),
    "a tokenizer's config that is deep": (replace("model/tokenizer_config.json", DEEP), TOKENIZER, "nested too deep"),
    "a chat template without end": (replace("model/chat_template.jinja", ENDLESS), CHAT, "rounds of loops and calls"),
    "a chat template of a large text": (replace("model/chat_template.jinja", "{{ 'a' * 10**10 }}"), CHAT, "too large"),
    "a chat template that reads a file": (
        replace("model/chat_template.jinja", "{% include '/etc/passwd' %}"),
        CHAT,
        "refuses it",
    ),
    "weights that are a pickle": (pickled("model/pytorch_model.bin"), MODEL, "pytorch_model.bin cannot be used"),
    "safetensors that are a pickle": (pickled("model/model.safetensors"), MODEL, "not a safetensors file"),
    "a header of 2^60 bytes": (
        replace("model/model.safetensors", safetensors({}, 2**60)),
        GENERATE,
        "header too large",
    ),
    "a shape that overflows": (
        replace("model/model.safetensors", tensor(shape=[2**62, 4])),
        MODEL,
        "overflow computing buffer size",
    ),
    "a shape of 2^60 rows of nothing": (
        replace("model/model.safetensors", tensor(shape=[2**60, 0], data_offsets=[0, 0])),
        MODEL,
        "not a safetensors file",
    ),
    "a negative offset": (replace("model/model.safetensors", tensor(data_offsets=[-8, 0])), MODEL, "invalid value"),
    "an offset of 2^63": (replace("model/model.safetensors", tensor(data_offsets=[0, 2**63])), MODEL, "invalid"),
    "a dtype of objects": (replace("model/model.safetensors", tensor(dtype="O")), MODEL, "unknown variant `O`"),
    "a shape that is not the config's": (changed_weight(lambda x: x[:-1].clone()), MODEL, f"has {NORM} as (31,)"),
    "a dtype that no weight has": (changed_weight(lambda x: x.to(torch.int64)), GENERATE, f"{NORM} is I64, not one"),
    "a shard outside of the folder": (index_of("../outside.safetensors"), MODEL, "'../outside.safetensors', which"),
    "a shard by its whole path": (index_of("{root}/outside.safetensors"), GENERATE, "no name of a file beside it"),
    "an index of a TiB": (
        lambda root: (index_of("a")(root), sparse("model/model.safetensors.index.json")(root)),
        MODEL,
        "1024.00 GiB, more than",
    ),
    "an array of objects": (objects, data("a.npy"), "Python objects in dtype"),
    "an array that is a pickle": (pickled("data/a.npy"), data("a.npy"), "not an array"),
    "an array of 2^64 ids": (
        replace("data/a.npy", npy(ARRAY.format("<i8", f"({2**64},)"))),
        data("a.npy"),
        "not an array",
    ),
    "an array of 2^61 ids": (
        replace("data/a.npy", npy(ARRAY.format("<i8", f"({2**61},)"))),
        data("a.npy"),
        "not an array",
    ),
    "an array whose header is deep": (replace("data/a.npy", npy("-" * 9000 + "1")), data("a.npy"), "not an array"),
    "an array whose header has 2 GiB": (long_header, data("a.npy"), "its header has more than 10000 bytes"),
    "a record that is packed a thousand times": (bomb(b'{"text": "a'), data("a.jsonl.gz"), "is too long for a record"),
    "zeros that are packed a thousand times": (bomb(b"\0"), data("a.jsonl.gz"), "line 1 is not JSON"),
    "empty lines that are packed": (bomb(b"\n"), data("a.jsonl.gz"), "empty lines in a row"),
    "a record that is deep": (replace("data/a.jsonl", '{"text": ' + DEEP), data("a.jsonl"), "line 1 is not JSON"),
    "Parquet that is a pickle": (pickled("data/a.parquet"), data("a.parquet"), "is not Parquet"),
    "Parquet with a footer of 2 GiB": (
        replace("data/a.parquet", b"PAR1" + struct.pack("<I", 2**31 - 1) + b"PAR1"),
        data("a.parquet"),
        "is not Parquet",
    ),
    "a saved dataset that names a file outside": (
        dataset_with(_data_files=[{"filename": "../a.parquet"}]),
        data("saved"),
        "names '../a.parquet', which is no file beside it",
    ),
    "a saved dataset of another type": (dataset_with(_data_files=3), data("saved"), "no list of '_data_files'"),
    "a saved dataset that is deep": (replace("data/saved/dataset_info.json", DEEP), data("saved"), "nested too deep"),
    "a saved dataset with a pickled type": (pickled_type, data("saved"), "is damaged: Keys mismatch"),
    "metrics that no run has written": (
        replace("run/metrics.jsonl", '{"step": "1"}\n'),
        resume,
        "line 1 is not of a step",
    ),
    "metrics that are deep": (replace("run/metrics.jsonl", DEEP + "\n"), resume, "nested too deep"),
}
"""A case: what is planted in the folder, a command that reads it, and words of the refusal."""

LONG = ("a chat template without end", "empty lines that are packed")
"""The cases that take seconds."""


PAGE, HEADING = "docs/faults.md", "Hostile files"
ROWS = {
    "a pipe, a socket, a device, or a folder in place of a file": (*SPECIAL, "a config without end"),
    "a link to nothing, or in a circle": tuple(SPECIAL),
    "a file that is larger than one of its kind may be": tuple(name for name in HOSTILE if "of a TiB" in name),
    "JSON that is nested deep, has a key twice, or a number that JSON lacks": (
        *(name for name in HOSTILE if name.endswith(("is deep", "are deep"))),
        *("a config with a key twice", "a config with NaN", "a number of 100,000 digits"),
    ),
    "a pickle in place of weights or data, or in an array or a dataset": (
        *(name for name in HOSTILE if "pickle" in name),
        "an array of objects",
    ),
    "safetensors or Parquet whose header, shape or offsets cannot be": (
        "Parquet with a footer of 2 GiB",
        *("a header of 2^60 bytes", "a shape that overflows", "a shape of 2^60 rows of nothing"),
        *("a negative offset", "an offset of 2^63", "a dtype of objects"),
    ),
    "weights of another shape or dtype than config.json describes": (
        *("a shape that is not the config's", "a dtype that no weight has"),
    ),
    "a name that leads out of a folder, in an index of weights or a saved dataset": (
        *("a shard outside of the folder", "a shard by its whole path"),
        *("a saved dataset that names a file outside", "a saved dataset of another type"),
    ),
    "an array of token ids whose header cannot be": tuple(name for name in HOSTILE if name.startswith("an array")),
    "a .gz that unpacks to a single line, or to empty lines": tuple(name for name in HOSTILE if "packed" in name),
    "a chat template that has no end, writes a large text, or reads files": (
        *(name for name in HOSTILE if name.startswith("a chat template")),
    ),
    "a metrics.jsonl that no run has written, where a run resumes": ("metrics that no run has written",),
}
"""The rows of the table in the documents, and what is planted for each."""


def test_the_table_of_hostile_files_has_a_row_for_each_that_is_planted() -> None:
    assert [row.what for row in rows(PAGE, HEADING)] == list(ROWS)
    assert {name for names in ROWS.values() for name in names} == {*HOSTILE, *SPECIAL}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x in LONG else x for x in HOSTILE])
def test_hostile_contents_are_refused_and_never_executed(
    name: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant, command, words = HOSTILE[name]
    plant(root)
    before = sorted(root.rglob("*"))
    text = refusal(command(root), capsys)
    assert words in text, text
    assert sorted(root.rglob("*")) == before
    assert not (root / "MARKER").exists()

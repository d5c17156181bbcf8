"""A checkpoint that is not what was written is refused by the name of the file, whatever has happened to it."""

import copy
import itertools
import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.checkpoint.checkpoint import save
from parallel.checkpoint.index import Index
from parallel.checkpoint.synced_file import SUMS, write_sums
from parallel.checkpoint.verify import verify
from parallel.errors import CheckpointError
from parallel.mesh.mesh import ALONE
from tests.checkpoints import seal
from tests.harness import run
from tests.patience import patient
from tests.tables import Row, rows
from tests.test_checkpoint import pieces_of, whole_tensors, world

INDEX, SHARDS = "checkpoint.json", [f"rank_{rank:05d}.safetensors" for rank in range(4)]
SECONDS = 2.0


def save_twice(rank: int, size: int, folder: Path) -> None:
    """Save two steps of a run, and one of another run, each in four shards; and one whose shards have one size."""
    for name, step, added in (("run/step_000006", 6, 0), ("run/step_000007", 7, 1), ("other/step_000007", 7, 2)):
        tensors = {key: x + added for key, x in whole_tensors().items()}
        owned = pieces_of("grid", rank, size, tensors, only_owned=True)
        metadata = dict(step=step, counters=dict(step=step, updates=step, samples=8 * step))
        save(folder / name, owned, metadata=metadata, axis=world(rank, size), keep=9)
    owned = pieces_of("grid", rank, size, {"square": torch.arange(64.0).view(8, 8)}, only_owned=True)
    save(folder / "square/step_000001", owned, metadata={}, axis=world(rank, size), keep=9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run(save_twice, 4, folder)
    return folder


@pytest.fixture
def step(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of the newest checkpoint, which is whole."""
    shutil.copytree(saved / "run", tmp_path / "run")
    verify(Index.read(tmp_path / "run/step_000007"), ALONE)
    return tmp_path / "run/step_000007"


def refusal(folder: Path) -> str:
    """Return what is said to a checkpoint, in seconds."""
    began, said = time.monotonic(), ""
    try:
        verify(Index.read(folder), ALONE)
    except CheckpointError as error:
        said = str(error)
    assert said, f"{folder} was not refused"
    assert time.monotonic() - began < patient(SECONDS)
    return said


def test_what_sha256sum_writes_is_what_is_written(step: Path) -> None:
    """The reference is coreutils' own program, in both directions."""
    checked = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=step, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout.count(": OK")) == (0, 5)
    written = subprocess.run(["sha256sum", *sorted([INDEX, *SHARDS])], cwd=step, capture_output=True, check=True)
    assert written.stdout == (step / SUMS).read_bytes()


def places(step: Path, count: int, seed: int) -> Iterator[tuple[Path, int]]:
    """Yield drawn places in files: a tenth of them in SHA256SUMS, and two tenths in the index."""
    draw = random.Random(seed)
    files = [step / name for name in (*SHARDS, SHARDS[0], *SHARDS[:2], INDEX, INDEX, SUMS)]
    for i in range(count):
        file = files[i % len(files)]
        yield file, draw.randrange(file.stat().st_size)


def test_forty_flipped_bits_are_each_refused_by_the_name_of_the_file(step: Path) -> None:
    draw, counts = random.Random(1), dict[str, int]()
    for file, place in places(step, 40, seed=1):
        content = bytearray(file.read_bytes())
        content[place] ^= 1 << draw.randrange(8)
        before = file.read_bytes()
        file.write_bytes(content)
        said = refusal(step)
        # A flipped bit of a digest or a name in SHA256SUMS is one of the file in its line, too.
        assert str(file) in said or (file.name == SUMS and str(step) in said), (file.name, place, said)
        file.write_bytes(before)
        counts[file.name] = counts.get(file.name, 0) + 1
    assert set(counts) == {*SHARDS, INDEX, SUMS}
    verify(Index.read(step), ALONE)


def test_forty_truncated_files_are_each_refused_by_name(step: Path) -> None:
    for file, length in places(step, 40, seed=2):
        before = file.read_bytes()
        file.write_bytes(before[:length])
        said = refusal(step)
        assert str(file) in said, (file.name, length, said)
        file.write_bytes(before)
    verify(Index.read(step), ALONE)


def test_longer_files_are_refused_by_name(step: Path) -> None:
    for name in (*SHARDS, INDEX, SUMS):
        before = (step / name).read_bytes()
        (step / name).write_bytes(before + b"\n")
        assert str(step / name) in refusal(step)
        (step / name).write_bytes(before)


@pytest.fixture
def square(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of a checkpoint whose shards all have one size; each is a good safetensors file by itself."""
    shutil.copytree(saved / "square", tmp_path / "square")
    step = tmp_path / "square/step_000001"
    assert len({size(step / name) for name in SHARDS}) == 1
    return step


def test_a_shard_of_another_rank_is_refused_by_its_name(square: Path) -> None:
    for one, other in itertools.permutations(SHARDS, 2):
        before = (square / one).read_bytes()
        shutil.copyfile(square / other, square / one)
        assert f"{square / one} is damaged, or another file" in refusal(square)
        (square / one).write_bytes(before)


def test_a_shard_of_another_step_or_run_is_refused_by_its_name(saved: Path, step: Path) -> None:
    for folder in (step.parent / "step_000006", saved / "other/step_000007"):
        for name in SHARDS:
            before = (step / name).read_bytes()
            assert size(folder / name) == size(step / name)
            shutil.copyfile(folder / name, step / name)
            assert f"{step / name} is damaged, or another file" in refusal(step)
            (step / name).write_bytes(before)


def size(file: Path) -> int:
    return file.stat().st_size


def test_two_exchanged_shards_are_both_named(square: Path) -> None:
    one, other = square / SHARDS[1], square / SHARDS[2]
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    said = refusal(square)
    assert f"{one} is damaged, or another file" in said
    assert f"{other} is damaged, or another file" in said


def test_an_index_or_checksums_of_another_step_are_refused(step: Path) -> None:
    for name in (INDEX, SUMS):
        before = (step / name).read_bytes()
        shutil.copyfile(step.parent / "step_000006" / name, step / name)
        assert str(step / INDEX) in refusal(step)
        (step / name).write_bytes(before)
    for name in (INDEX, SUMS):  # both together: then it is the shards that are another step's
        shutil.copyfile(step.parent / "step_000006" / name, step / name)
    assert str(step / SHARDS[0]) in refusal(step)


@pytest.mark.parametrize("counter", ["step", "updates", "samples"])
def test_an_altered_counter_is_refused(step: Path, counter: str) -> None:
    """Such a run once went on at another place of its data and its schedule."""
    index = json.loads((step / INDEX).read_text())
    index["metadata"]["counters"][counter] += 1
    (step / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    assert f"{step / INDEX} is damaged, or another file" in refusal(step)


# -- checksums ---------------------------------------------------------------------------------------------------------

SUMS_CHANGES: dict[str, tuple[Callable[[list[str]], list[str]], str]] = {
    "a line less": (lambda lines: lines[:-1], f"it has no line of {SHARDS[3]}"),
    "no line of the index": (lambda lines: lines[1:], f"it has no line of {INDEX}"),
    "a line more": (lambda lines: [*lines, lines[-1].replace("00003", "00004")], "a line of rank_00004.safetensors"),
    "a line twice": (lambda lines: [*lines, lines[-1]], "it is not what sha256sum writes"),
    "an empty line": (lambda lines: [*lines, ""], "it is not what sha256sum writes"),
    "a file elsewhere": (lambda lines: [*lines, f"{'0' * 64}  ../{INDEX}"], "it is not what sha256sum writes"),
    "no line": (lambda lines: [], "it is not what sha256sum writes"),
}


@pytest.mark.parametrize("change", SUMS_CHANGES)
def test_checksums_with_other_lines_are_refused(step: Path, change: str) -> None:
    alter, words = SUMS_CHANGES[change]
    lines = alter((step / SUMS).read_text().splitlines())
    (step / SUMS).write_text("".join(f"{line}\n" for line in lines))
    said = refusal(step)
    assert f"{step / SUMS} is damaged: " in said
    assert words in said


def test_a_checkpoint_of_an_older_version_is_refused_with_a_command_that_helps(step: Path) -> None:
    (step / SUMS).unlink()
    said = refusal(step)
    assert f"{step / SUMS} is missing: an older version has written this checkpoint without it" in said
    command = said[said.index("(cd ") : said.rindex(".")]
    subprocess.run(["sh", "-c", command], check=True)
    verify(Index.read(step), ALONE)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(step: Path) -> None:
    for name in (INDEX, *SHARDS):
        (step / name).rename(step.parent / name)
        said = refusal(step)
        assert str(step / name) in said
        assert "is missing" in said or "does not exist" in said
        (step.parent / name).rename(step / name)


def test_a_file_that_the_index_does_not_name_is_refused_by_its_name(step: Path) -> None:
    shutil.copyfile(step / SHARDS[0], step / "rank_00000-001.safetensors")
    assert f"{step / 'rank_00000-001.safetensors'} is no file of this checkpoint" in refusal(step)


@pytest.mark.parametrize("name", [INDEX, SHARDS[1], SUMS])
def test_a_link_to_the_right_bytes_is_refused(step: Path, name: str) -> None:
    (step / name).rename(step.parent / name)
    (step / name).symlink_to(step.parent / name)
    assert f"{step / name} is a link" in refusal(step)


# -- an index whose checksum is right, but which no save has written ---------------------------------------------------


def part(index: dict[str, Any], place: int = 0) -> Any:
    return index["tensors"]["fc1.bias"]["parts"][place]


def first_part(index: dict[str, Any]) -> Any:
    return index["tensors"]["master:fc1.weight"]["parts"][0]


def put(target: Any, key: Any, value: Any) -> None:
    target[key] = value


STRUCTURES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a name with a folder": lambda x: put(x["files"], "../rank_00000.safetensors", 1),
    "an absolute name": lambda x: put(x["files"], "/etc/passwd", 1),
    "a hidden name": lambda x: put(x["files"], ".safetensors", 1),
    "a name with a line end": lambda x: put(x["files"], "a\n.safetensors", 1),
    "a part in a file elsewhere": lambda x: put(part(x), "file", "../step_000006/rank_00000.safetensors"),
    "a part in another file than named": lambda x: put(part(x), "file", "rank_00009.safetensors"),
    "a part in no file": lambda x: put(part(x), "file", None),
    "a part without a key": lambda x: part(x).pop("key"),
    "a key of a number": lambda x: put(part(x), "key", 3),
    "a box that is larger": lambda x: put(part(x), "box", [[0, 11]]),
    "a box that begins before": lambda x: put(part(x), "box", [[-1, 10]]),
    "a box of a fraction": lambda x: put(part(x), "box", [[0, 10.0]]),
    "a box of a truth value": lambda x: put(part(x), "box", [[False, 10]]),
    "a box of other dims": lambda x: put(part(x), "box", [[0, 10], [0, 1]]),
    "a box of three bounds": lambda x: put(part(x), "box", [[0, 5, 10]]),
    "an empty box": lambda x: put(part(x), "box", [[0, 0]]),
    "a part left out": lambda x: x["tensors"]["master:fc1.weight"]["parts"].pop(),
    "a part twice": lambda x: x["tensors"]["master:fc1.weight"]["parts"].append(first_part(x)),
    "overlapping parts": lambda x: put(first_part(x), "box", x["tensors"]["master:fc1.weight"]["parts"][1]["box"]),
    "no parts": lambda x: put(x["tensors"]["fc1.bias"], "parts", []),
    "parts of an object": lambda x: put(x["tensors"]["fc1.bias"], "parts", {}),
    "no shape": lambda x: x["tensors"]["fc1.bias"].pop("shape"),
    "a larger shape": lambda x: put(x["tensors"]["fc1.bias"], "shape", [2**40]),
    "a huge shape with one part": lambda x: x["tensors"]["fc1.bias"].update(
        shape=[2**60], parts=[part(x) | dict(box=[[0, 2**60]])]
    ),
    "a shape beyond all bounds": lambda x: put(x["tensors"]["fc1.bias"], "shape", [10**400]),
    "a shape of a thousand dims": lambda x: put(x["tensors"]["fc1.bias"], "shape", [1] * 1000),
    "a tensor of a number": lambda x: put(x["tensors"], "fc1.bias", 3),
    "tensors of a list": lambda x: put(x, "tensors", []),
    "files of a list": lambda x: put(x, "files", list(x["files"])),
    "metadata of text": lambda x: put(x, "metadata", "step 7"),
    "a size of text": lambda x: put(x["files"], SHARDS[0], "1"),
    "a size below zero": lambda x: put(x["files"], SHARDS[0], -1),
    "a size beyond all bounds": lambda x: put(x["files"], SHARDS[0], 10**30),
    "no tensors": lambda x: x.pop("tensors"),
}


@pytest.mark.parametrize("change", STRUCTURES)
def test_an_index_that_no_save_has_written_is_refused_though_its_checksum_is_right(step: Path, change: str) -> None:
    index = json.loads((step / INDEX).read_text())
    STRUCTURES[change](index)
    (step / INDEX).write_text(json.dumps(index))
    seal(step)
    assert f"{step / INDEX} is damaged: " in refusal(step)


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a key that is not there": lambda x: put(first_part(x), "key", "other"),
    "another box of the same size": lambda x: exchange_dims(x["tensors"]["embed_tokens.weight"]),
}


def exchange_dims(tensor: dict[str, Any]) -> None:
    tensor["shape"].reverse()
    for one in tensor["parts"]:
        one["box"].reverse()


@pytest.mark.parametrize("change", HEADERS)
def test_an_index_that_differs_from_the_headers_of_the_files_is_refused(step: Path, change: str) -> None:
    index = json.loads((step / INDEX).read_text())
    HEADERS[change](index)
    (step / INDEX).write_text(json.dumps(index))
    seal(step)
    assert "is damaged, or another file: it has " in refusal(step)


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each place of a value of JSON: the list or object that it is in, and its index or key."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from leaves(value[key])


STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**400,
    0.5,
    "",
    "x",
    "../x",
    "\0",
    "\ud800",
    [],
    [[]],
    {},
    {"$tensor": 0},
)


def test_an_index_with_a_strange_value_anywhere_is_refused_or_read_but_never_breaks_down(step: Path) -> None:
    whole, draw = json.loads((step / INDEX).read_text()), random.Random(3)
    refused = 0
    for _ in range(400):
        index = copy.deepcopy(whole)
        container, key = draw.choice(list(leaves(index)))
        container[key] = draw.choice(STRANGE)
        content = json.dumps(index).encode()
        (step / INDEX).write_bytes(content)
        sums = dict(line.split("  ")[::-1] for line in (step / SUMS).read_text().splitlines())
        write_sums(step, sums | {INDEX: sha256(content).hexdigest()})
        try:
            verify(Index.read(step), ALONE)
        except CheckpointError as error:
            refused += 1
            said = str(error)
        else:
            said = f"{step}"
            assert index["files"] == whole["files"]
            assert index["tensors"] in (whole["tensors"], {})
        assert str(step) in said
        assert said.isprintable()
    assert refused > 200


# -- the table of the document -----------------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Any]], object], *, is_sealed: bool = True) -> Callable[[Path], object]:
    """Return a damage that changes the index of a checkpoint."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index)
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        if is_sealed:
            seal(folder)

    return damage


def flipped(folder: Path) -> None:
    content = bytearray((folder / SHARDS[2]).read_bytes())
    content[-3] ^= 16
    (folder / SHARDS[2]).write_bytes(content)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        (folder / SHARDS[1]).unlink()
        make(folder / SHARDS[1])

    return damage


DAMAGES: dict[str, list[Callable[[Path], object]]] = {
    "a flipped bit": [flipped],
    "a shard of another rank, step or run, of the same size": [
        lambda x: shutil.copyfile(x.parent / "step_000006" / SHARDS[0], x / SHARDS[0])
    ],
    "a counter in the index that was changed": [
        changed(lambda x: put(x["metadata"]["counters"], "samples", 8), is_sealed=False)
    ],
    "a file that was cut off, or is longer": [
        lambda x: (x / SHARDS[0]).write_bytes((x / SHARDS[0]).read_bytes()[:99]),
        lambda x: (x / SHARDS[0]).write_bytes((x / SHARDS[0]).read_bytes() + b"0"),
    ],
    "a file that is missing": [lambda x: (x / SHARDS[3]).unlink()],
    "a file that the index does not name": [lambda x: (x / "other.safetensors").touch()],
    "a line too few, or too many, in SHA256SUMS": [
        lambda x: (x / SUMS).write_text("".join((x / SUMS).read_text().splitlines(keepends=True)[:-1])),
        lambda x: (x / SUMS).write_text((x / SUMS).read_text() + f"{'0' * 64}  other.safetensors\n"),
    ],
    "a link, a pipe or a folder in place of a file": [
        replaced(lambda file: file.symlink_to(SHARDS[0])),
        replaced(os.mkfifo),
        replaced(Path.mkdir),
    ],
    "an index that names a file outside the folder": [changed(STRUCTURES["a name with a folder"])],
    "an index whose parts do not cover a tensor, or cover it twice": [
        changed(STRUCTURES["a part left out"]),
        changed(STRUCTURES["overlapping parts"]),
    ],
    "an index that differs from the headers of the files": [changed(HEADERS["a key that is not there"])],
    "no SHA256SUMS: an older version has written the checkpoint": [lambda x: (x / SUMS).unlink()],
}


@pytest.mark.parametrize("row", rows("docs/faults.md", "Checkpoints that are damaged"), ids=str)
def test_a_damaged_checkpoint_is_answered_as_the_table_says(row: Row, step: Path) -> None:
    whole, said = step.parent / "whole", []
    shutil.copytree(step, whole)
    for damage in DAMAGES[row.what]:
        damage(step)
        said.append(refusal(step))
        shutil.rmtree(step)
        shutil.copytree(whole, step)
    words = row.answer.split("`")[1::2]
    assert all(any(text in one for one in said) for text in words)
    assert all(any(text in one for text in words) for one in said)


def test_every_damage_has_a_row() -> None:
    assert [row.what for row in rows("docs/faults.md", "Checkpoints that are damaged")] == list(DAMAGES)

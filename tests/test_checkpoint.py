"""Checkpoints: any layout loads bit for bit what another saved, and errors name the file that is damaged or full."""

import errno
import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.checkpoint.checkpoint import (
    find_checkpoint,
    load,
    read_metadata,
    resolve_latest,
    save,
    step_folder,
)
from parallel.checkpoint.index import Index
from parallel.checkpoint.newest import find_newest
from parallel.checkpoint.verify import verify
from parallel.errors import CheckpointError, NoRoomError
from parallel.layout.cover import covered_once
from parallel.layout.layout import Layout, Piece, slices
from parallel.mesh.mesh import ALONE, Axis, Traffic
from tests.checkpoints import seal
from tests.harness import run
from tests.parity import owns

SHAPES = {
    "master:fc1.weight": ((12, 8), torch.float64),
    "exp_avg:fc1.weight": ((12, 8), torch.float32),
    "embed_tokens.weight": ((7, 6), torch.bfloat16),  # padded, since no axis divides 7
    "fc1.bias": ((10,), torch.float32),
    "step": ((), torch.int64),
}
LAYOUTS = [("replicated", 1), ("rows", 2), ("columns", 4), ("grid", 4)]


def whole_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: (100 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for name, (shape, dtype) in SHAPES.items()
    }


def axis(rank: int, size: int) -> Axis:
    """Return an axis without a process group, for layouts, or of size 1 to save on one rank."""
    return Axis("planned", rank, size, tuple(range(size)), None, Traffic())


def world(rank: int, size: int) -> Axis:
    return Axis("world", rank, size, tuple(range(size)), dist.group.WORLD, Traffic())


def layout(kind: str, place: int, shape: tuple[int, ...], rank: int, size: int) -> Layout:
    """Return the layout of the tensor with index `place`. Replicated tensors are owned by one rank, in turn."""
    all_ranks = axis(rank, size)
    if kind == "rows" and shape:
        return Layout(shape, ((all_ranks,), *[()] * (len(shape) - 1)))
    if kind == "columns" and len(shape) == 2:
        return Layout(shape, ((), (all_ranks,)))
    if kind == "grid" and len(shape) == 2:
        return Layout(shape, ((axis(rank // 2, 2),), (axis(rank % 2, 2),)))
    return Layout(shape, ((),) * len(shape), copies=(axis((rank - place) % size, size),))  # rank 0 of it is the owner


def pieces_of(kind: str, rank: int, size: int, tensors: dict[str, Tensor], *, only_owned: bool) -> list[Piece]:
    """Return the pieces of a rank, with the values of `tensors`."""
    pieces = []
    for place, (name, tensor) in enumerate(tensors.items()):
        own = layout(kind, place, tuple(tensor.shape), rank, size)
        if owns(own) or not only_owned:
            pieces.append(Piece(name, own.shape, own.box, tensor[slices(own.box)].clone()))
    return [piece for piece in pieces if piece.data.numel()]


def save_in(rank: int, size: int, kind: str, folder: Path) -> None:
    owned = pieces_of(kind, rank, size, whole_tensors(), only_owned=True)
    save(folder, owned, metadata={"step": 7, "layout": kind}, axis=world(rank, size), keep=2)


def save_alone(folder: Path, keep: int = 2) -> None:
    owned = pieces_of("replicated", 0, 1, whole_tensors(), only_owned=True)
    save(folder, owned, metadata={"step": 7}, axis=axis(0, 1), keep=keep)


def newest(run: Path) -> Path | None:
    """Return the newest whole checkpoint of a run."""
    found = find_newest(run / "checkpoints")
    return None if found is None else found.index.folder


def empty_pieces() -> list[Piece]:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in whole_tensors().items()}
    return pieces_of("replicated", 0, 1, zeros, only_owned=False)


@pytest.mark.parametrize(("kind", "size"), LAYOUTS)
def test_every_layout_loads_bit_for_bit_what_another_saved(tmp_path: Path, kind: str, size: int) -> None:
    folder, tensors = step_folder(tmp_path, 7), whole_tensors()
    run(save_in, size, kind, folder)
    assert read_metadata(folder) == {"step": 7, "layout": kind}
    assert resolve_latest(tmp_path / "checkpoints") == folder
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for other, other_size in LAYOUTS:
        for rank in range(other_size):
            pieces = pieces_of(other, rank, other_size, zeros, only_owned=False)
            num_bytes = load(folder, pieces)
            assert num_bytes == sum(piece.data.numel() * piece.data.element_size() for piece in pieces)
            for piece in pieces:
                assert torch.equal(piece.data, tensors[piece.name][slices(piece.box)]), (other, rank, piece.name)


def test_a_piece_is_cast_to_its_own_dtype(tmp_path: Path) -> None:
    save_alone(tmp_path / "step_000001")
    data = torch.zeros(12, 8, dtype=torch.bfloat16)
    load(tmp_path / "step_000001", [Piece("master:fc1.weight", (12, 8), ((0, 12), (0, 8)), data)])
    assert torch.equal(data, whole_tensors()["master:fc1.weight"].bfloat16())


def test_every_tensor_of_a_file_starts_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    """Otherwise a reader could not map it without a copy."""
    save_alone(tmp_path / "step_000001")
    content = (tmp_path / "step_000001" / "rank_00000.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    del header["__metadata__"]
    assert len(header) == len(SHAPES)
    for key, entry in header.items():
        item_size = SHAPES[key.split("[")[0]][1].itemsize
        assert (8 + length + entry["data_offsets"][0]) % item_size == 0, key


def test_covered_once_notices_a_gap_and_an_overlap_of_equal_size() -> None:
    halves = [((0, 4), (0, 3)), ((0, 4), (3, 6))]
    assert covered_once((4, 6), halves)
    assert covered_once((), [()])
    assert not covered_once((4, 6), halves[:1])
    assert not covered_once((4, 6), [halves[0], halves[0]])
    assert not covered_once((4, 6), [halves[0], ((0, 4), (2, 5))])
    assert not covered_once((), [(), ()])


def save_what_two_ranks_own(rank: int, size: int, folder: Path) -> str:
    everything = pieces_of("replicated", rank, size, whole_tensors(), only_owned=False)
    with pytest.raises(AssertionError) as failure:
        save(folder, everything, metadata={}, axis=world(rank, size), keep=1)
    return str(failure.value)


def test_a_tensor_that_two_ranks_own_is_refused_on_each_of_them(tmp_path: Path) -> None:
    assert all(
        "is not owned exactly once" in message for message in run(save_what_two_ranks_own, 2, tmp_path / "step_000001")
    )
    assert list(tmp_path.iterdir()) == []


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond `num_bytes`: a write then fails as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_with_a_full_disk_on_rank_1(rank: int, size: int, checkpoints: Path) -> str:
    save_in(rank, size, "rows", checkpoints / "step_000001")
    with pytest.raises(NoRoomError) as failure, full_disk(400 if rank == 1 else 10**6):
        save_in(rank, size, "rows", checkpoints / "step_000002")
    return str(failure.value)


def test_a_full_disk_on_one_rank_fails_on_all_and_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    for message in run(save_with_a_full_disk_on_rank_1, 2, tmp_path):
        assert "step_000002" in message
        assert "rank_00001.safetensors: File too large" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000001"]
    assert resolve_latest(tmp_path) == tmp_path / "step_000001"
    load(tmp_path / "step_000001", empty_pieces())


def save_metadata_that_is_no_json(rank: int, size: int, folder: Path) -> str:
    everything = pieces_of("replicated", rank, size, whole_tensors(), only_owned=True)
    with pytest.raises(TypeError if rank == 0 else CheckpointError) as failure:  # rank 0 writes the index
        save(folder, everything, metadata=dict(extra=torch.ones(2)), axis=world(rank, size), keep=1)
    return str(failure.value)


def test_no_rank_waits_after_one_rank_failed_to_write(tmp_path: Path) -> None:
    for message in run(save_metadata_that_is_no_json, 2, tmp_path / "step_000001"):
        assert "not JSON serializable" in message
    assert list(tmp_path.iterdir()) == []


def save_under_a_file(rank: int, size: int, folder: Path) -> str:
    with pytest.raises(CheckpointError) as failure:
        save_in(rank, size, "rows", folder)
    return str(failure.value)


def test_a_folder_that_cannot_be_made_raises_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file instead of the folder")
    for message in run(save_under_a_file, 2, tmp_path / "checkpoints" / "step_000001"):
        assert f"{tmp_path}/checkpoints" in message


def test_the_newest_checkpoints_are_kept_and_other_folders_stay(tmp_path: Path) -> None:
    (tmp_path / "step_best").mkdir()
    (tmp_path / ".step_000002.incomplete").mkdir()  # a save that was interrupted
    for step in (1, 2, 3):
        save_alone(tmp_path / f"step_{step:06d}", keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000002", "step_000003", "step_best"]


def test_checkpoints_of_later_steps_are_deleted_first(tmp_path: Path) -> None:
    """A run resumed from step 1 saves step 2 again: the old checkpoints of steps 2, 3 and 4 are obsolete."""
    for step in (1, 2, 3, 4):
        save_alone(tmp_path / f"step_{step:06d}", keep=9)
    save_alone(tmp_path / "step_000002", keep=2)
    assert resolve_latest(tmp_path) == tmp_path / "step_000002"
    assert sorted(path.name for path in tmp_path.glob("*step_*")) == ["step_000001", "step_000002"]


def test_a_run_goes_on_if_an_old_checkpoint_cannot_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, **_: Any) -> None:
        if path.name == "step_000001":
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    save_alone(step_folder(tmp_path, 1))
    monkeypatch.setattr(shutil, "rmtree", refuse)
    save_alone(step_folder(tmp_path, 2), keep=1)
    assert newest(tmp_path) == step_folder(tmp_path, 2)
    assert "cannot delete" in caplog.text


def test_resume_accepts_a_run_its_checkpoints_and_one_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for step in (1, 2):
        save_alone(step_folder(tmp_path, step))
    first, second = step_folder(tmp_path, 1), step_folder(tmp_path, 2)
    assert newest(tmp_path) == second
    assert find_checkpoint(str(tmp_path)) == second
    assert find_checkpoint(str(tmp_path / "checkpoints")) == second
    assert find_checkpoint(str(first)) == first
    shutil.rmtree(second)  # `latest` still names it
    assert newest(tmp_path) == first
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        find_checkpoint(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty holds no checkpoint"):
        find_checkpoint(str(tmp_path / "empty"))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_alone(tmp_path / "step_000001")
    return tmp_path / "step_000001"


def test_a_truncated_file_is_named(saved: Path) -> None:
    file = saved / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors is damaged: it has \d+ bytes"):
        load(saved, empty_pieces())


def test_a_file_overwritten_with_noise_is_named(saved: Path) -> None:
    file = saved / "rank_00000.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors is damaged"):
        load(saved, empty_pieces())
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors is damaged"):
        verify(Index.read(saved), ALONE)


@pytest.mark.parametrize("place", [4, 20, 60, 90, -100, -1])
def test_a_flipped_bit_anywhere_in_a_file_is_named(saved: Path, place: int) -> None:
    file = saved / "rank_00000.safetensors"
    verify(Index.read(saved), ALONE)
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors is damaged"):
        verify(Index.read(saved), ALONE)


def test_a_missing_file_is_named(saved: Path) -> None:
    (saved / "rank_00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors is missing"):
        load(saved, empty_pieces())


@pytest.mark.parametrize("content", ["{", "[]", '{"files": {}}', "[" * 10**5])
def test_a_damaged_index_is_named(saved: Path, content: str) -> None:
    (saved / "checkpoint.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is damaged"):
        read_metadata(saved)
    seal(saved)  # even if the checksum were right
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is .*damaged"):
        read_metadata(saved)


def test_a_tensor_that_is_not_in_the_checkpoint_is_named(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor fc2\.bias"):
        load(saved, [Piece("fc2.bias", (4,), ((0, 4),), torch.zeros(4))])


def test_a_tensor_of_another_shape_is_named_with_both_shapes(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"fc1\.bias is \(10,\), the model needs \(12,\)"):
        load(saved, [Piece("fc1.bias", (12,), ((0, 4),), torch.zeros(4))])


def test_a_box_that_no_file_holds_is_named(saved: Path) -> None:
    index = json.loads((saved / "checkpoint.json").read_text())
    index["tensors"]["fc1.bias"]["parts"][0]["box"] = [[0, 9]]
    (saved / "checkpoint.json").write_text(json.dumps(index))
    seal(saved)
    with pytest.raises(CheckpointError, match=r"the parts of 'fc1\.bias' \(10,\) do not cover it exactly once"):
        Index.read(saved)


def test_an_index_that_would_be_too_large_to_be_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of many numbers was saved, and the checkpoint refused by whoever wanted to go on from it."""
    monkeypatch.setattr("parallel.checkpoint.checkpoint.MOST_BYTES", 2**16)
    folder = tmp_path / "step_000001"
    with pytest.raises(CheckpointError, match=r"checkpoint.json would have .* as tensors or arrays"):
        save(folder, [], metadata=dict(extra=[*range(2**14)]), axis=ALONE, keep=1)
    assert not folder.exists()

"""Ranks return results in order, and a rank that fails, dies or hangs is named and ends the others."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.harness import RankError, run
from tests.patience import LIMIT

ROOT = Path(__file__).parent.parent


def tensor_of_rank(rank: int, world_size: int, scale: float) -> torch.Tensor:
    return torch.full((2, 3), scale * rank, dtype=torch.float64)


def sum_over_ranks(rank: int, world_size: int) -> float:
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    return total.item()


def raise_on_rank_2(rank: int, world_size: int, folder: Path) -> None:
    (folder / str(rank)).write_text(str(os.getpid()))
    if rank == 2:
        raise LookupError("the key is missing")
    dist.barrier()


def exit_on_rank_1(rank: int, world_size: int, folder: Path) -> None:
    (folder / str(rank)).write_text(str(os.getpid()))
    dist.barrier()
    if rank == 1:
        os._exit(7)
    dist.barrier()


def wait_for_rank_0(rank: int, world_size: int, folder: Path) -> None:
    (folder / str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        a_barrier_that_rank_0_skips()


def a_barrier_that_rank_0_skips() -> None:
    dist.barrier()


def process_id(rank: int, world_size: int) -> int:
    return os.getpid()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def pids_in(folder: Path) -> list[int]:
    return [int(file.read_text()) for file in folder.iterdir()]


def test_results_come_back_in_order_of_rank() -> None:
    results = run(tensor_of_rank, 3, 0.5)
    assert [result[0, 0].item() for result in results] == [0.0, 0.5, 1.0]
    assert all(result.dtype == torch.float64 and result.shape == (2, 3) for result in results)


@pytest.mark.parametrize("world_size", [1, 4])
def test_ranks_are_joined_in_one_process_group(world_size: int) -> None:
    assert run(sum_over_ranks, world_size) == [sum(range(world_size))] * world_size


def test_the_traceback_of_the_failing_rank_arrives_and_ends_the_others_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run(raise_on_rank_2, 4, tmp_path)
    assert time.monotonic() - start < LIMIT / 2, "the other ranks went on until the timeout"
    message = str(caught.value)
    assert message.startswith("rank 2 of 4 failed")
    assert "LookupError: the key is missing" in message
    assert "in raise_on_rank_2" in message
    assert not any(map(is_alive, pids_in(tmp_path)))


def test_a_rank_that_dies_is_named_with_its_exit_code(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 1 of 3 died with exit code 7"):
        run(exit_on_rank_1, 3, tmp_path)
    assert not any(map(is_alive, pids_in(tmp_path)))


def test_a_hang_is_ended_and_its_stack_is_shown(tmp_path: Path) -> None:
    for seconds in (3, 30, 300):  # in which a busy machine starts two ranks, and rank 0 returns
        with pytest.raises(RankError) as caught:
            run(wait_for_rank_0, 2, tmp_path, timeout=seconds)
        message = str(caught.value)
        if "1 of 2 ranks" in message:
            break
    assert f"1 of 2 ranks had not returned after {seconds} s" in message
    assert "rank 1 of 2 is stuck" in message
    assert "in a_barrier_that_rank_0_skips" in message
    assert "rank 0 of 2 is stuck" not in message
    assert not any(map(is_alive, pids_in(tmp_path)))


def visible_gpus(rank: int, world_size: int) -> tuple[str | None, int]:
    return os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()


def test_no_process_sees_a_gpu_unless_the_option_is_given() -> None:
    assert [visible_gpus(0, 1), *run(visible_gpus, 2)] == [("", 0)] * 3


@pytest.mark.gpu
def test_a_rank_sees_the_gpus_that_this_process_sees() -> None:
    assert run(visible_gpus, 2) == [visible_gpus(0, 1)] * 2


def test_no_module_of_tests_starts_cuda_when_it_is_imported() -> None:
    """Ranks are forked from a process that has imported them: none of them would have a GPU."""
    found = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        if "is_available" not in (text := path.read_text(encoding="utf-8")):
            continue
        tree = ast.parse(text)
        inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for b in f.body for n in ast.walk(b)}
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in inside)
        found += [path.name for node in calls if node.attr == "is_available"]
    assert found == []


def test_where_there_is_no_gpu_the_option_runs_no_test_and_fails_none() -> None:
    command = [sys.executable, "-m", "pytest", "--gpu", "tests/test_topology.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stdout
    assert "torch sees no GPU here" in done.stderr


def test_no_process_remains() -> None:
    assert not any(map(is_alive, run(process_id, 4)))


def test_no_file_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run(sum_over_ranks, 2)
    with pytest.raises(RankError):
        run(raise_on_rank_2, 3, Path("/nowhere"))
    assert list(tmp_path.iterdir()) == []

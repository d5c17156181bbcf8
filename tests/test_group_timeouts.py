"""No collective fails by itself before the watch has named the rank that it waits for."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import parallel
from parallel.engine.rendezvous import leave_nccl_to_the_watch
from tests.parting import play

TIMEOUT = 4000  # seconds: more than the half hour that torch gives a group by default


def make_every_group(rank: int, folder: Path) -> None:
    config = dict(train=dict(device="cpu", timeout_seconds=TIMEOUT), parallel=dict(pipeline=dict(size=2)))
    context = parallel.launch_from_torch(config, debug_comm=True)
    context.mesh.background()
    groups = list(dist.distributed_c10d._world.pg_map)
    timeouts = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    print(len(groups), min(timeouts), file=sys.stderr, flush=True)
    assert min(timeouts) > timedelta(seconds=TIMEOUT)
    parallel.leave()


def test_the_timeout_of_every_process_group_exceeds_that_of_the_watch() -> None:
    for end in play(make_every_group, 2):
        assert end.code == 0, end.errors
        assert int(end.errors.split()[0]) > 9  # world, on the host, in the background, ends, links, and all compared


def test_the_watchdog_of_nccl_ends_no_process_unless_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    monkeypatch.delenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", raising=False)
    leave_nccl_to_the_watch(timedelta(minutes=30))
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1"
    assert os.environ.pop("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC") == "1800"
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    leave_nccl_to_the_watch(timedelta(minutes=30))
    assert os.environ.pop("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "0"
    del os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]

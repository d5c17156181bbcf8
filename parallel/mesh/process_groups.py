"""Process groups of torch.distributed: the default one, of all ranks, and those that a mesh makes for its axes."""

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

ProcessGroup: TypeAlias = dist.ProcessGroup
GroupStore: TypeAlias = Store


LONGEST_WAIT = timedelta(minutes=30)
"""The time after which a collective fails, if `train.timeout_seconds` is not longer."""

SECONDS_TO_CONNECT = timedelta(seconds=300)
"""The time that a rank waits for the host of the store."""


def group_timeout(timeout_seconds: float) -> timedelta:
    """Return the time after which a collective fails: later than the watch names the rank that it waits for."""
    return max(LONGEST_WAIT, timedelta(seconds=2 * timeout_seconds + 60))


def join_world(
    backend: str,
    rank: int,
    world_size: int,
    *,
    device: torch.device,
    timeout: timedelta = LONGEST_WAIT,
    store: Store | None = None,
) -> None:
    """Make the default process group, unless there is one already; every rank calls this.

    The ranks meet in this store, or at the address that torchrun left in the environment. Under nccl, tensors on the
    host (checkpoints, exports) are still sent by gloo.
    """
    if dist.is_initialized():
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if backend == "nccl" else backend,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        store=store,
        device_id=device if backend == "nccl" else None,
    )


def leave() -> None:
    """Destroy all process groups of this process, where there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_group() -> ProcessGroup:
    """Return the default process group, which `join_world` or the user has made."""
    group = dist.group.WORLD
    assert group is not None
    return group


def world_size() -> int:
    """Return the number of ranks in the default process group."""
    return dist.get_world_size()


def new_group(ranks: Sequence[int], backend: str | None = None, *, timeout: timedelta = LONGEST_WAIT) -> ProcessGroup:
    """Make a process group of these ranks; every rank of the world calls this, in the same order for all groups."""
    group: ProcessGroup = dist.new_group(list(ranks), backend=backend, timeout=timeout)
    return group


def destroy_group(group: ProcessGroup) -> None:
    """Destroy a group that `new_group` made; each of its ranks calls this, with none of its messages in flight."""
    dist.destroy_process_group(group)


def connect_to_store(host: str, port: int, *, hosts: bool, prefix: str) -> Store:
    """Return the store at this address, under keys that begin with `prefix`, by a connection of its own.

    `hosts`: this process hosts it, if it does not yet. A store's client is blocked while it waits for a key: so the
    process groups have another one.
    """
    store = TCPStore(host, port, None, hosts, SECONDS_TO_CONNECT, wait_for_workers=False, multi_tenant=True)
    return PrefixStore(prefix, store)


def host_store(prefix: str) -> tuple[Store, int]:
    """Start a store in this process, for ranks of this host; return it, under keys that begin so, and its port."""
    store = TCPStore("127.0.0.1", 0, None, True, SECONDS_TO_CONNECT, wait_for_workers=False)
    return PrefixStore(prefix, store), store.port

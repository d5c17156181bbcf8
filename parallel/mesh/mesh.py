"""The mesh of ranks: its axes, and the process group behind each of them.

An `Axis` is one direction of the mesh seen from this rank, or several directions merged into one. Axes are passed to
whoever communicates; nobody looks a group up by name further in. The groups are made once, by every rank, in one order.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeAlias

import torch
import torch.distributed as dist

from parallel.mesh.topology import Topology


@dataclass(eq=False)
class Traffic:
    """Bytes that this rank handed to each kind of collective, and how often."""

    bytes: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def count(self, kind: str, tensor: torch.Tensor) -> None:
        self.bytes[kind] += tensor.numel() * tensor.element_size()
        self.calls[kind] += 1

    def reset(self) -> None:
        self.bytes.clear()
        self.calls.clear()


@dataclass(frozen=True, eq=False)
class Axis:
    """One direction of the mesh (or several merged, outermost first), seen from this rank.

    `rank` is this rank's coordinate along it, `ranks` are the global ranks that differ in this coordinate alone, in
    order. `group` is None where there is nobody to talk to: an axis of size 1, or a mesh that is only being planned.
    """

    name: str
    rank: int
    size: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    traffic: Traffic


Groups: TypeAlias = dict[tuple[int, ...], dist.ProcessGroup]  # by their ranks

ALONE = Axis("alone", 0, 1, (0,), None, Traffic())
"""Nobody else: what stands in a table where a mode does not communicate."""


class Mesh:
    """Every axis of the mesh, seen from one rank.

    `merged` names the axes that will be asked for together. With `connect=False` there are no process groups: such a
    mesh plans (layouts, shapes, memory) but cannot communicate.
    """

    def __init__(
        self,
        topology: Topology,
        rank: int,
        *,
        device: torch.device | None = None,
        merged: Iterable[tuple[str, ...]] = (),
        connect: bool = True,
    ) -> None:
        self.topology, self.rank, self.device = topology, rank, device or torch.device("cpu")
        self.traffic = Traffic()
        self._connect = connect
        self._axes: dict[tuple[str, ...], Axis] = {}
        everything = tuple(topology.shape)
        self._own_groups: list[dist.ProcessGroup] = []
        ranks = tuple(range(topology.world_size))
        # The whole world has a group already. A communicator more costs a GPU memory, and a run time to begin.
        made: Groups = {ranks: _whole_world()} if connect and len(ranks) > 1 else {}
        for names in (*((name,) for name in everything), *merged, everything):
            key = self._key(names)
            if key not in self._axes:
                self._axes[key] = self._make("+".join(key) or "trivial", topology.groups(key), made)
        self.world = self._axes[self._key(everything)]
        # The first and the last pipeline stage, over which a tied embedding is summed; one between them is alone.
        self.ends = self._make("ends", topology.ends("pipe") if topology.shape["pipe"] > 1 else [], made)
        # The pipe again, in process groups of their own: see `p2p.Pipe`.
        self.links = tuple(self._make(f"pipe link {k}", topology.groups(("pipe",)), {}) for k in range(4))

    def axis(self, *names: str) -> Axis:
        """The axis that merges `names`. KeyError where the mesh was not told of this combination when it was made."""
        return self._axes[self._key(names)]

    def close(self) -> None:
        """Give up the process groups that were made for this mesh. Every rank calls this, with nothing on its way."""
        while self._own_groups:
            dist.destroy_process_group(self._own_groups.pop(0))

    @property
    def coordinates(self) -> dict[str, int]:
        return self.topology.coordinates(self.rank)

    def _key(self, names: Iterable[str]) -> tuple[str, ...]:
        """Merged axes have one order, the mesh's own; a direction of size 1 adds no rank, so it is left out."""
        wanted, sizes = set(names), self.topology.shape
        assert wanted <= set(sizes), f"no axis {wanted - set(sizes)} in a mesh of {sizes}"
        return tuple(name for name in sizes if name in wanted and sizes[name] > 1)

    def _make(self, name: str, groups: Iterable[tuple[int, ...]], made: Groups) -> Axis:
        """The one of `groups` that holds this rank, as an axis. Every rank calls this with the same groups.

        `made`: the process groups that there are, to be used where their ranks are the same, and added to.
        """
        mine: Axis | None = None
        for ranks in groups:
            if self._connect and len(ranks) > 1 and ranks not in made:
                made[ranks] = dist.new_group(list(ranks))
                if self.rank in ranks:
                    self._own_groups.append(made[ranks])
            if self.rank in ranks:
                mine = Axis(name, ranks.index(self.rank), len(ranks), ranks, made.get(ranks), self.traffic)
        return mine or Axis(name, 0, 1, (self.rank,), None, self.traffic)


def _whole_world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def join(backend: str, rank: int, world_size: int, *, device: torch.device, timeout_minutes: float = 30) -> None:
    """Meet the other ranks, at the address that torchrun left in the environment, unless they have met already.

    Under nccl, host tensors (checkpoints, exports) still travel by gloo.
    """
    if dist.is_initialized():
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if backend == "nccl" else backend,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=timeout_minutes),
        device_id=device if backend == "nccl" else None,
    )


def on_the_host(axis: Axis) -> Axis:
    """An axis that is the whole world, again, in a process group of its own that never waits for a device. Its bytes
    are not counted with the mesh's. Every rank calls this.
    """
    assert axis.group is None or axis.size == dist.get_world_size(), f"{axis.name} is not the whole world"
    group = dist.new_group(list(axis.ranks), backend="gloo") if axis.group is not None else None
    return Axis(f"{axis.name} on the host", axis.rank, axis.size, axis.ranks, group, Traffic())


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()

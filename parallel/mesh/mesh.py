"""The mesh of ranks: its axes, and the process group behind each of them (torch's counterpart is DeviceMesh).

An `Axis` is one direction of the mesh as seen from this rank, or several directions merged into one. Axes are passed
as arguments to the code that communicates; no code looks a group up by its name. All ranks make the groups once, in
the same order.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch

from parallel.mesh.comparison import Comparison
from parallel.mesh.process_groups import (
    ProcessGroup,
    destroy_group,
    group_timeout,
    new_group,
    world_group,
    world_size,
)
from parallel.mesh.topology import Link, Topology
from parallel.watch.watch import UNWATCHED, Watch


@dataclass(eq=False)
class Traffic:
    """The bytes that this rank handed to each kind of collective, and the number of calls."""

    bytes: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def count(self, kind: str, tensor: torch.Tensor) -> None:
        """Count one call of this kind, which was given the tensor."""
        self.bytes[kind] += tensor.numel() * tensor.element_size()
        self.calls[kind] += 1

    def reset(self) -> None:
        """Set all counts to zero."""
        self.bytes.clear()
        self.calls.clear()


@dataclass(frozen=True, eq=False)
class Axis:
    """One direction of the mesh (or several merged, outermost first), as seen from this rank.

    `rank` is this rank's coordinate along the axis, `size` the number of coordinates. `ranks` are the global ranks that
    differ from this one in that coordinate alone, in order. `group` is None where there is no other rank to communicate
    with: on an axis of size 1, or in a mesh that was made without process groups. `traffic` counts what this rank
    sends, over all axes of its mesh. `watch` knows when a rank that is waited for has ended. `on_host`, which the axis
    of the whole world has, is the same axis with a gloo process group of its own, so that its collectives never wait
    for a device; they are not counted in the mesh's traffic. `comparison` compares, where it is asked for, what the
    ranks are about to communicate.
    """

    name: str
    rank: int
    size: int
    ranks: tuple[int, ...]
    group: ProcessGroup | None
    traffic: Traffic
    watch: Watch = UNWATCHED
    on_host: "Axis | None" = None
    comparison: Comparison | None = None


Groups: TypeAlias = dict[tuple[int, ...], ProcessGroup]
"""Process groups by their ranks."""

ALONE = Axis("alone", 0, 1, (0,), None, Traffic())
"""An axis of size 1 that belongs to no mesh: tables have it where a mode does not communicate."""


@dataclass(eq=False)
class Background:
    """The work of a thread beside the main thread.

    `axis` is the world with a gloo process group of its own, since the main thread's collectives and this thread's
    would come in another order on each rank. The watch over the other ranks sees the main thread alone: not this axis.
    `wait` returns when the work in flight has ended, after which process groups may be destroyed.
    """

    axis: Axis
    wait: Callable[[], None] = lambda: None


class Mesh:
    """All axes of the mesh, as seen from one rank.

    `merged` names the combinations of axes that will be asked for as one axis. `connect=False` makes no process groups:
    such a mesh is good for planning (layouts, shapes, memory), and cannot communicate.

    Besides the axes that `axis` returns, a mesh has `world`, all of its axes merged; `ends`, the ranks of the first and
    of the last pipeline stage, over which the gradient of a tied embedding is summed (on any other rank, and where one
    rank has both stages, an axis of size 1); and `links`, the pipe axis for each link between neighbours, in process
    groups of their own (see `p2p.Pipe`).
    """

    def __init__(
        self,
        topology: Topology,
        rank: int,
        *,
        device: torch.device | None = None,
        merged: Iterable[tuple[str, ...]] = (),
        connect: bool = True,
        watch: Watch = UNWATCHED,
    ) -> None:
        self.topology, self.rank, self.device = topology, rank, device or torch.device("cpu")
        self.traffic, self.watch = Traffic(), watch
        self._connect = connect
        self._axes: dict[tuple[str, ...], Axis] = {}
        everything = tuple(topology.shape)
        self._own_groups: list[ProcessGroup] = []
        ranks = tuple(range(topology.world_size))
        # The whole world has a group already. Another communicator costs memory of a GPU, and time at the start.
        groups: Groups = {ranks: world_group()} if connect and len(ranks) > 1 else {}
        for names in (*((name,) for name in everything), *merged, everything):
            key = self._key(names)
            if key not in self._axes:
                self._axes[key] = self._make_axis("+".join(key) or "trivial", topology.groups(key), groups)
        self.world = self._axes[self._key(everything)] = self._with_host(self._axes[self._key(everything)])
        self.ends = self._make_axis("ends", topology.ends(), groups)
        self._background: Background | None = None
        self.links = self._make_links()

    def axis(self, *names: str) -> Axis:
        """Return the axis that merges `names`. Raises KeyError for a combination that `merged` did not have."""
        return self._axes[self._key(names)]

    def compare_calls(self) -> None:
        """Compare from now on, before each collective, what the ranks call; made for debugging, it takes time.

        Every rank calls this, before an axis of the mesh is used. Ranks that differ raise a CollectiveError.
        """
        topology, everything = self.topology, self._key(self.topology.shape)
        self._axes = {key: self._compared(axis, topology.groups(key)) for key, axis in self._axes.items()}
        self.world = self._axes[everything]
        if self.world.on_host is not None:
            self.world = replace(self.world, on_host=self._compared(self.world.on_host, topology.groups(everything)))
            self._axes[everything] = self.world
        self.ends = self._compared(self.ends, topology.ends())
        compared = {
            axis: self._compared(axis, topology.groups(("pipe",))) for axis in dict.fromkeys(self.links.values())
        }
        self.links = {link: compared[axis] for link, axis in self.links.items()}

    def _compared(self, axis: Axis, rank_groups: Iterable[tuple[int, ...]]) -> Axis:
        """Return an axis whose calls are compared, by process groups of its own. Every rank gives the same groups."""
        for ranks in rank_groups:
            if self._connect and len(ranks) > 1:
                group = new_group(ranks, backend="gloo", timeout=group_timeout(self.watch.timeout))
                if self.rank in ranks:
                    self._own_groups.append(group)
                    axis = replace(axis, comparison=Comparison(axis.name, ranks, group))
        return axis

    def close(self) -> None:
        """Destroy the process groups that were made for this mesh. Every rank calls this, with nothing in flight."""
        self.wait_for_background()
        while self._own_groups:
            destroy_group(self._own_groups.pop(0))

    def background(self) -> Background:
        """Return what a thread beside the main thread needs. Every rank calls this, in its main thread; the first call
        makes a process group.
        """
        if self._background is None:
            axis = self.world
            if axis.group is not None:
                axis = self._on_gloo(axis, "in the background", Watch())
            self._background = Background(axis)
        return self._background

    def wait_for_background(self) -> None:
        """Return when no work is in flight beside the main thread."""
        if self._background is not None:
            with self.watch.phase("saving"):
                self._background.wait()

    @property
    def coordinates(self) -> dict[str, int]:
        """This rank's coordinate along each axis."""
        return self.topology.coordinates(self.rank)

    def _key(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the names in the mesh's order, without those of size 1, which add no rank."""
        wanted, sizes = set(names), self.topology.shape
        assert wanted <= set(sizes), f"no axis {wanted - set(sizes)} in a mesh of {sizes}"
        return tuple(name for name in sizes if name in wanted and sizes[name] > 1)

    def _make_axis(self, name: str, rank_groups: Iterable[tuple[int, ...]], groups: Groups) -> Axis:
        """Return the axis along the one of `rank_groups` that holds this rank. Every rank gives the same `rank_groups`.

        A process group is taken from `groups` where these have one of the same ranks; otherwise it is made, and added.
        """
        mine: Axis | None = None
        for ranks in rank_groups:
            if self._connect and len(ranks) > 1 and ranks not in groups:
                groups[ranks] = new_group(ranks, timeout=group_timeout(self.watch.timeout))
                if self.rank in ranks:
                    self._own_groups.append(groups[ranks])
            if self.rank in ranks:
                mine = Axis(
                    name, ranks.index(self.rank), len(ranks), ranks, groups.get(ranks), self.traffic, self.watch
                )
        return mine or Axis(name, 0, 1, (self.rank,), None, self.traffic)

    def _make_links(self) -> Mapping[Link, Axis]:
        """Return the pipe axis of each link: one for all links of a group. Every rank calls this."""
        numbers, rank_groups = self.topology.links(), self.topology.groups(("pipe",))
        axes = [self._make_axis(f"pipe link {i}", rank_groups, {}) for i in range(len({*numbers.values()}))]
        return {link: axes[number] for link, number in numbers.items()}

    def _with_host(self, world: Axis) -> Axis:
        """Return the axis of the whole world, with `on_host` where it has other ranks. Every rank calls this."""
        if world.group is None:
            return world
        assert world.size == world_size(), f"{world.name} is not the whole world"
        return replace(world, on_host=self._on_gloo(world, "on the host", self.watch))

    def _on_gloo(self, world: Axis, name: str, watch: Watch) -> Axis:
        """Return the axis of the whole world with a gloo process group of its own. Every rank calls this."""
        group = new_group(world.ranks, backend="gloo", timeout=group_timeout(self.watch.timeout))
        self._own_groups.append(group)
        return Axis(f"{world.name} {name}", world.rank, world.size, world.ranks, group, Traffic(), watch)

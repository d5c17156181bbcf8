"""Jobs that measure what connects the ranks: bandwidth, a layer's ring attention, and the memory of NCCL."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import ring
from benchmarks.gpu_jobs import RankSetup, Row, bytes_beside_torch, clean, meet
from benchmarks.gpu_layouts import Layout
from parallel.config import parse
from parallel.engine.context import Context
from parallel.mesh.collectives import start_all_gather, start_all_reduce, start_reduce_scatter
from parallel.mesh.mesh import Axis, Mesh
from parallel.pipeline.p2p import Pipe, start_receive, start_send


@dataclass(frozen=True)
class RingJob:
    """The parts of a layer's attention over a sequence that is split over all ranks: see `benchmarks.ring`.

    `tokens`: of each rank.
    """

    tokens: int
    part: str = "ring"
    model: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.tokens} tokens a rank"

    def run(self, setup: RankSetup) -> list[Row]:
        """Return a row for each part; one that fails on all ranks loses its row."""
        context = _context_of(dict(parallel=dict(context=dict(size=setup.world))), setup)
        tokens, heads, head = (self.tokens // 64, 8, 16) if setup.tiny else (self.tokens, 32, 128)
        found = ring.measure(context, tokens, heads=heads, head=head)
        context.mesh.close()
        return [Row(part=self.part, name=f"{name}, {tokens} tokens", note=text) for name, text in found.items()]


@dataclass(frozen=True)
class MemoryJob:
    """The memory that NCCL takes beside torch's allocator: of the world, and of the groups of these layouts."""

    layouts: list[Layout] = field(default_factory=list)
    part: str = "nccl"
    name: str = "memory"
    model: str = ""
    seconds: float = 0.0

    def run(self, setup: RankSetup) -> list[Row]:
        """Return a row for the world, and one for each layout, whose groups are used once and then destroyed."""
        x = torch.zeros(2**16, device=setup.device)
        torch.distributed.all_reduce(x)
        found = (bytes_beside_torch(setup) - setup.bytes_before) / 2**20
        rows = [Row(part=self.part, name="world", note=f"{found:.0f} MiB after an all-reduce", mib=found)]
        for layout in self.layouts:
            clean(setup)
            before = bytes_beside_torch(setup)
            mesh = _mesh_of(layout.sections, setup)
            _use(mesh, setup)
            taken = (bytes_beside_torch(setup) - before) / 2**20
            groups = sum(
                axis.group is not None for axis in {*map(mesh.axis, mesh.topology.shape), *mesh.links.values()}
            )
            mesh.close()
            kept = (bytes_beside_torch(setup) - before) / 2**20
            note = f"{taken:.0f} MiB for {groups} groups of this rank, {kept:.0f} left after they are destroyed"
            rows.append(Row(part=self.part, name=layout.name, note=note, mib=taken, left_mib=kept, groups=groups))
        return rows


def _context_of(sections: Row, setup: RankSetup) -> Context:
    """Return the context of a layout; its model does not matter."""
    train = dict(global_batch_size=8 * setup.world, micro_batch_size=8, device="cpu" if setup.tiny else "auto")
    raw = dict(data=dict(sequence_length=64), train=train) | {k: v for k, v in sections.items() if k != "train"}
    return setup.context(parse(raw, world_size=setup.world))


def _mesh_of(sections: Row, setup: RankSetup) -> Mesh:
    return _context_of(sections, setup).mesh


def _use(mesh: Mesh, setup: RankSetup) -> None:
    """Communicate once along each axis, and from stage to stage."""
    for name in mesh.topology.shape:
        start_all_reduce(torch.zeros(2**16, device=setup.device), mesh.axis(name)).wait()
    if mesh.axis("pipe").size > 1:
        Pipe(mesh.axis("pipe"), mesh.links).connect(setup.device)
    meet(setup)


@dataclass(frozen=True)
class BandwidthJob:
    """The bandwidth along each axis of these layouts' meshes, with all groups of the axis busy at once.

    It is compared with one large all-reduce over all ranks.
    """

    layouts: list[Layout] = field(default_factory=list)
    part: str = "bandwidth"
    name: str = "world"
    model: str = ""
    seconds: float = 0.0

    def run(self, setup: RankSetup) -> list[Row]:
        """Return a row for the world, and one for each axis that was not measured already."""
        large, small = (2**16, 2**14) if setup.tiny else (2**30, 2**28)  # bytes
        rows: list[Row] = []
        seen: set[tuple[object, bool]] = set()
        whole = 0.0
        for layout in self.layouts:
            mesh = _mesh_of(layout.sections, setup)
            if not rows:
                whole = _all_reduce(mesh.world, large, setup)
                note = f"all_reduce {whole:.3g} GB/s of {large // 2**20} MiB"
                rows.append(Row(part=self.part, name="world", note=note, all_reduce=whole))
            for name, size in mesh.topology.shape.items():
                groups = tuple(mesh.topology.groups((name,)))
                if size == 1 or (groups, name == "pipe") in seen:
                    continue
                seen.add((groups, name == "pipe"))
                pipe = Pipe(mesh.axis("pipe"), mesh.links) if name == "pipe" else None
                if pipe is not None:
                    pipe.connect(setup.device)
                found = _speeds(mesh.axis(name), small, setup, is_pipe=pipe is not None)
                note = ", ".join(f"{kind} {speed:.3g} GB/s ({speed / whole:.0%})" for kind, speed in found.items())
                rows.append(Row(part=self.part, name=f"{name} of {layout.name}: {groups[0]}", note=note, **found))
            mesh.close()
        return rows


def _speeds(axis: Axis, size: int, setup: RankSetup, *, is_pipe: bool) -> dict[str, float]:
    """Return the bus bandwidth of each collective in GB/s, as nccl-tests define it: what the slowest link carries."""
    x = torch.zeros(size // 4 // axis.size * axis.size, device=setup.device)
    own = x.chunk(axis.size)[axis.rank]
    others = x.nbytes * (axis.size - 1) / axis.size / 1e9
    found = {
        "all_reduce": _all_reduce(axis, size, setup),
        "all_gather": _rate(lambda: start_all_gather(own, 0, axis, out=x).wait(), setup) * others,
        "reduce_scatter": _rate(lambda: start_reduce_scatter(x, 0, axis, in_place=True).wait(), setup) * others,
    }
    if is_pipe:
        found["send"] = _rate(lambda: _pass_on(x, axis), setup) * x.nbytes / 1e9
    return found


def _pass_on(x: Tensor, axis: Axis) -> None:
    """Send x from every even rank to the next one."""
    if axis.rank % 2 == 0 and axis.rank + 1 < axis.size:
        start_send(x, axis, axis.rank + 1).wait()
    elif axis.rank % 2:
        start_receive(tuple(x.shape), x, axis, axis.rank - 1).wait()


def _all_reduce(axis: Axis, size: int, setup: RankSetup) -> float:
    """Return the bus bandwidth of an all-reduce of so many bytes, in GB/s."""
    x = torch.zeros(size // 4, device=setup.device)
    rate = _rate(lambda: start_all_reduce(x, axis, in_place=True).wait(), setup)
    return rate * size * 2 * (axis.size - 1) / axis.size / 1e9


def _rate(collective: Callable[[], object], setup: RankSetup) -> float:
    """Return how many times a second a collective can be called."""
    times = 1 if setup.tiny else 10
    for _ in range(2):
        collective()
    meet(setup)
    start = time.perf_counter()
    for _ in range(times):
        collective()
    meet(setup)
    return times / (time.perf_counter() - start)

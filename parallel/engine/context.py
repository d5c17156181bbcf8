"""Who and where this process is: the one place that reads and sets the environment, and the context that the short
public forms use.
"""

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parallel.config import Config, Resolver, load_raw, parse
from parallel.errors import ConfigError
from parallel.mesh.mesh import Mesh, join
from parallel.mesh.topology import Topology
from parallel.tensor import MODES

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Place:
    """A process among those started together: its rank, how many there are, and the same on its own host."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Place":
        """What torchrun says; without RANK, a world of one. Raises ConfigError where it contradicts itself."""
        if "RANK" not in os.environ:
            return cls()
        try:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local, local_world = (int(os.environ.get(f"LOCAL_{key}", "0")) for key in ("RANK", "WORLD_SIZE"))
        except (KeyError, ValueError) as error:
            raise ConfigError(f"environment: RANK is set, but {error}. Start with torchrun, or unset RANK.") from error
        return cls(rank, world, local, local_world or world)


@dataclass(frozen=True, eq=False)
class Context:
    """A config, and this process's place in the mesh that it describes."""

    config: Config
    mesh: Mesh
    place: Place

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.config.train.precision]

    @property
    def device(self) -> torch.device:
        return self.mesh.device


def device_type(wanted: str) -> str:
    """That of a run's devices, on a machine like this one."""
    return "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.device_count()) else "cpu"


def choose_device(wanted: str, place: Place) -> tuple[torch.device, str]:
    """This rank's device, and the backend: nccl where each local rank has a GPU of its own, else gloo."""
    count = torch.cuda.device_count()
    if wanted == "cuda" and not count:
        raise ConfigError(
            "train.device: 'cuda' needs a GPU that torch can see, and there is none. Try 'auto' or 'cpu'."
        )
    if device_type(wanted) == "cpu":
        return torch.device("cpu"), "gloo"
    backend = "nccl" if place.local_world_size <= count else "gloo"
    return torch.device("cuda", place.local_rank % count), backend


def make_context(config: Config, place: Place, *, connect: bool = True, device: torch.device | None = None) -> Context:
    """The context of a config at a place. With `connect=False` nothing is started: for planning, on any `device`."""
    topology = Topology(config.parallel.mesh_shape(place.world_size))
    merged = MODES[config.parallel.tensor.mode].merged_axes()
    if not connect:
        return Context(config, Mesh(topology, place.rank, device=device, merged=merged, connect=False), place)
    device, backend = choose_device(config.train.device, place)
    if device.type == "cuda":
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
        if config.zero.device_memory is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, config.zero.device_memory / total), device)
    else:
        _keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:  # ranks on one host share its cores
            torch.set_num_threads(max(1, _cores() // place.local_world_size))
    if place.world_size > 1:
        join(backend, place.rank, place.world_size, device=device)
    return Context(config, Mesh(topology, place.rank, device=device, merged=merged), place)


def _cores() -> int:
    """Those that this process may use: a job's share of a host, where there is such a thing."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _keep_freed_memory() -> None:
    """What a step frees, the next one will need. Left alone, glibc gives large blocks back to the kernel, which clears
    every page anew. The largest still go: of those it would keep more than are used, as it seldom reuses aligned ones.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # bytes, the most that it takes: from there on a block is a mapping


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """A block in which other libraries find these in the environment."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_current: ContextVar[Context] = ContextVar("context")


def current() -> Context:
    """The context of the last `launch_from_torch` or `use`."""
    try:
        return _current.get()
    except LookupError:
        raise RuntimeError("no context yet: call parallel.launch_from_torch(config) first") from None


def use(context: Context) -> Context:
    """Make it the current one."""
    _current.set(context)
    return context


def launch_from_torch(config: str | Path | Mapping[str, Any] | Config, *, resolve: Resolver | None = None) -> Context:
    """Read a config (a file, a dict, or one already parsed), join the ranks that torchrun started, and make the mesh.

    Without RANK in the environment, a world of one. Raises ConfigError before any process group exists.
    """
    place = Place.from_environment()
    if not isinstance(config, Config):
        raw = load_raw(config) if isinstance(config, str | Path) else config
        config = parse(raw, world_size=place.world_size, resolve=resolve, batches=False)
    return use(make_context(config, place))

"""A process among those of a run: its rank, its config and its mesh; and the current context, which the functions of
the library use that take none.
"""

import os
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from parallel.config import Config, Resolver, load_raw, parse
from parallel.engine.device import choose_device, set_up_device
from parallel.errors import ConfigError
from parallel.mesh.mesh import Mesh
from parallel.mesh.process_groups import join_world
from parallel.mesh.topology import Topology
from parallel.modules.shares import Shares
from parallel.tensor import MODES

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Place:
    """The place of this process among those that were started together.

    `rank` is its number among `world_size` processes, `local_rank` its number among the `local_world_size` processes of
    its own host. Both count from 0.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Place":
        """Return the place that torchrun's environment variables give; without RANK, a world of one process.

        Raises ConfigError where RANK is set, and another variable is missing or is no number; and where another
        launcher has started several processes without it, each of which would be a world of its own.
        """
        if "RANK" not in os.environ:
            _refuse_other_launchers()
            return cls()
        try:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local, local_world = (int(os.environ.get(f"LOCAL_{key}", "0")) for key in ("RANK", "WORLD_SIZE"))
        except (KeyError, ValueError) as error:
            raise ConfigError(f"environment: RANK is set, but {error}. Start with torchrun, or unset RANK.") from error
        return cls(rank, world, local, local_world or world)


OTHER_LAUNCHERS = {"srun": "SLURM_STEP_NUM_TASKS", "mpirun": "OMPI_COMM_WORLD_SIZE", "mpiexec": "PMI_SIZE"}
"""The variables in which other launchers say how many processes they have started."""


def _refuse_other_launchers() -> None:
    """Raise ConfigError where one of these has started several processes, and no torchrun is between."""
    for launcher, variable in OTHER_LAUNCHERS.items():
        count = os.environ.get(variable, "")
        if count.isdecimal() and int(count) > 1:
            raise ConfigError(
                f"environment: {launcher} has started {count} tasks, and none has a RANK: each would train alone."
                f" Let {launcher} start one torchrun on each host, as docs/many_hosts.md shows."
            )


@dataclass(frozen=True, eq=False)
class Context:
    """A config, the mesh that it describes as this rank sees it, and the place of this process.

    `shares` are those of the batches of all loaders that `initialize` has divided.
    """

    config: Config
    mesh: Mesh
    place: Place
    shares: Shares = field(default_factory=Shares)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters and activations: `train.precision`."""
        return DTYPES[self.config.train.precision]

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.mesh.device


def make_context(config: Config, place: Place, *, connect: bool = True, device: torch.device | None = None) -> Context:
    """Return the context of a config at a place: choose and set up the device, join the other ranks, make the mesh.

    `connect=False` does nothing but make a mesh without process groups, for planning on any `device`.
    """
    topology = Topology(config.parallel.mesh_shape(place.world_size))
    merged = MODES[config.parallel.tensor.mode].merged_axes()
    if not connect:
        return Context(config, Mesh(topology, place.rank, device=device, merged=merged, connect=False), place)
    device, backend = choose_device(
        config.train.device, local_rank=place.local_rank, local_world_size=place.local_world_size
    )
    set_up_device(device, memory_limit=config.zero.device_memory, local_world_size=place.local_world_size)
    if place.world_size > 1:
        join_world(backend, place.rank, place.world_size, device=device)
    return Context(config, Mesh(topology, place.rank, device=device, merged=merged), place)


_current: ContextVar[Context] = ContextVar("context")


def current() -> Context:
    """Return the context of the last `launch_from_torch` or `use`. Raises RuntimeError where there was none."""
    try:
        return _current.get()
    except LookupError:
        raise RuntimeError("no context yet: call parallel.launch_from_torch(config) first") from None


def use(context: Context) -> Context:
    """Make this context the current one, and return it."""
    _current.set(context)
    return context


def launch_from_torch(config: str | Path | Mapping[str, Any] | Config, *, resolve: Resolver | None = None) -> Context:
    """Read a config, join the ranks that torchrun started, make the mesh, and return the context, now the current one.

    `config` is a file, a dict, or a config that was parsed already. Without RANK in the environment it is a world of
    one process. `resolve` fills in the sizes of a named model, as `parse` does. Raises ConfigError, with all the
    problems of the config, before any process group exists.
    """
    place = Place.from_environment()
    if not isinstance(config, Config):
        raw = load_raw(config) if isinstance(config, str | Path) else config
        config = parse(raw, world_size=place.world_size, resolve=resolve, batches=False)
    return use(make_context(config, place))

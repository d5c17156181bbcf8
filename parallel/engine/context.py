"""A process among those of a run: its rank, its config and its mesh; and the current context, which the functions of
the library use that take none.
"""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from parallel.config import Config, Resolver, load_raw, parse
from parallel.engine.device import check_precision, choose_device, set_up_device
from parallel.engine.facts import facts_of
from parallel.engine.rendezvous import leave_nccl_to_the_watch, start_watch, store_of_groups
from parallel.errors import ConfigError
from parallel.mesh import process_groups
from parallel.mesh.mesh import Mesh
from parallel.mesh.process_groups import group_timeout, join_world
from parallel.mesh.topology import Topology
from parallel.modules.shares import Shares
from parallel.tensor import MODES
from parallel.watch.last_line import Speaker
from parallel.watch.watch import UNWATCHED, Watch

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype as a config has it: torch.bfloat16 -> 'bf16'."""
    return next(name for name, of_torch in DTYPES.items() if of_torch == dtype)


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

    @property
    def num_threads(self) -> int:
        """This rank's share of the processors of its host: the threads that it may use for files."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world_size)

    @property
    def host_ranks(self) -> range:
        """The ranks of this host."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_world_size)

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
        """The dtype of parameters and activations."""
        return DTYPES[self.config.train.dtype]

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.mesh.device

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Return a context for long work of this rank alone, which is no silence while the others wait for it.

        with context.phase("tokenizing"):
            ...
        """
        return self.mesh.watch.phase(name)


def topology_of(config: Config, world_size: int) -> Topology:
    """Return the mesh of a config over this many ranks, and which of them holds which pipeline stage."""
    pipeline = config.parallel.pipeline
    ranks = tuple(pipeline.rank_of(stage) for stage in range(pipeline.num_stages))
    return Topology(config.parallel.mesh_shape(world_size), ranks)


def make_context(
    config: Config,
    place: Place,
    *,
    connect: bool = True,
    device: torch.device | None = None,
    watch: Watch = UNWATCHED,
    debug_comm: bool = False,
) -> Context:
    """Return the context of a config at a place: choose and set up the device, join the other ranks, make the mesh.

    `connect=False` does nothing but make a mesh without process groups, for planning on any `device`. `watch` is this
    rank's over the others. With `debug_comm` the ranks compare what they communicate, before they do.
    """
    topology = topology_of(config, place.world_size)
    merged = MODES[config.parallel.tensor.kind].merged_axes()
    if not connect:
        return Context(config, Mesh(topology, place.rank, device=device, merged=merged, connect=False), place)
    device, backend = choose_device(
        config.train.device, local_rank=place.local_rank, local_world_size=place.local_world_size
    )
    set_up_device(device, memory_limit=config.zero.device_memory, local_world_size=place.local_world_size)
    if place.world_size > 1:
        timeout = group_timeout(config.train.timeout_seconds)
        if watch.is_on:
            leave_nccl_to_the_watch(timeout)
        store = store_of_groups()
        join_world(backend, place.rank, place.world_size, device=device, timeout=timeout, store=store)
        watch.progress.uses_gpu = device.type == "cuda"
        watch.follow_errors()
    mesh = Mesh(topology, place.rank, device=device, merged=merged, watch=watch)
    if debug_comm:
        mesh.compare_calls()
    return Context(config, mesh, place)


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


def launch_from_torch(
    config: str | Path | Mapping[str, Any] | Config, *, resolve: Resolver | None = None, debug_comm: bool = False
) -> Context:
    """Read a config, join the ranks that torchrun started, make the mesh, and return the context, now the current one.

    `config` is a file, a dict, or a config that was parsed already. Without RANK in the environment it is a world of
    one process. `resolve` fills in the sizes of a named model, as `parse` does. With `debug_comm` the ranks compare
    each collective before it begins, and those that differ raise a CollectiveError; it takes time. Raises ConfigError,
    with all the problems of the config, before any process group exists: on every rank where one has problems, or
    another config, code or world than the others.
    """
    place = Place.from_environment()
    watch = watch_of(place)
    with watch.refusing():
        if not isinstance(config, Config):
            raw = load_raw(config) if isinstance(config, str | Path) else config
            config = parse(raw, world_size=place.world_size, resolve=resolve, batches=False)
        _refuse_keys_of_a_run(config)
        device, _ = choose_device(
            config.train.device, local_rank=place.local_rank, local_world_size=place.local_world_size
        )
        check_precision(config.train.precision, device)
        if watch.is_on:
            facts = {**facts_of(config, place.world_size), "debug_comm": debug_comm}
            watch.meet(facts, config.train.timeout_seconds)
    return use(make_context(config, place, watch=watch, debug_comm=debug_comm))


def _refuse_keys_of_a_run(config: Config) -> None:
    """Raise ConfigError for keys that decide how long `colonnade train` trains: here the loop is the user's own."""
    train, problems = config.train, []
    if train.epochs is not None:
        problems.append(
            f"train.epochs: {train.epochs:g} is for colonnade train, which knows its data. In a loop of yours set"
            " train.steps=epochs * len(loader), by which the learning rate falls."
        )
    if train.early_stopping is not None:
        problems.append(
            "train.early_stopping: it is for colonnade train. In a loop of yours leave the loop, and set"
            " train.early_stopping=None."
        )
    if problems:
        raise ConfigError(*problems)


def watch_of(place: Place, *, speaker: Speaker = "every") -> Watch:
    """Return this rank's watch over the others: that of the current context, or a new one.

    `speaker`: who prints that a rank was lost.
    """
    running = _current.get(None)
    if running is not None and running.mesh.watch.is_on:
        return running.mesh.watch
    return start_watch(place.rank, place.world_size, place.host_ranks, speaker=speaker)


def leave() -> None:
    """Finish what is being saved, leave the other ranks, and destroy all process groups of this process."""
    if (context := _current.get(None)) is not None:
        context.mesh.wait_for_background()
        context.mesh.watch.leave()
    process_groups.leave()

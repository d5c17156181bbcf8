"""The rendezvous of the ranks: where torchrun, or `--nprocs`, says that their store is, and the watch that uses it."""

import os
from dataclasses import dataclass

from parallel.errors import ConfigError
from parallel.mesh.process_groups import connect_to_store
from parallel.watch.board import Board, prefix_of
from parallel.watch.heartbeat import Heartbeat, Speaker, Surroundings
from parallel.watch.process import die_with
from parallel.watch.progress import Progress
from parallel.watch.pulse import Pulse
from parallel.watch.watch import UNWATCHED, StoreWatch, Watch


@dataclass(frozen=True)
class Rendezvous:
    """The address of the store, hosted by the launcher or else by rank 0. `attempt` counts torchrun's restarts."""

    host: str
    port: int
    launcher_hosts: bool
    attempt: str

    @classmethod
    def from_environment(cls) -> "Rendezvous | None":
        """Return the rendezvous that the environment describes, if it does. Raises ConfigError for a bad port."""
        host, port = (os.environ.get(key, "") for key in ("MASTER_ADDR", "MASTER_PORT"))
        if not host or not port:
            return None
        if not port.isdecimal():
            raise ConfigError(f"environment: MASTER_PORT: {port!r} is no port. Start with torchrun.")
        launcher_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(host, int(port), launcher_hosts, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def start_watch(rank: int, world_size: int, host_ranks: range, *, speaker: Speaker = "every") -> Watch:
    """Begin to watch, and return the watch of this rank; nobody is watched in a world of one or without a rendezvous.

    Every rank calls this. `host_ranks` are those of this host. `speaker`: who prints that a rank was lost.
    """
    found = Rendezvous.from_environment()
    if world_size == 1 or found is None:
        return UNWATCHED
    hosts = rank == 0 and not found.launcher_hosts
    launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    if launcher is not None:
        die_with(launcher)
    store = connect_to_store(found.host, found.port, hosts=hosts, prefix=prefix_of(found.attempt))
    board = Board(store, rank, world_size)
    surroundings = Surroundings(host_ranks, launcher, speaker)
    return StoreWatch(board, Heartbeat(board, Pulse(rank, Progress()), surroundings), hosts_store=hosts)

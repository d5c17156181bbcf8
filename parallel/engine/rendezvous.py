"""The rendezvous of the ranks: where torchrun, or `--nprocs`, says that their store is, and the watch that uses it."""

import os
from dataclasses import dataclass
from datetime import timedelta

from parallel.errors import ConfigError
from parallel.mesh.process_groups import GroupStore, connect_to_store
from parallel.watch.board import Board, prefix_of
from parallel.watch.heartbeat import Heartbeat, Surroundings
from parallel.watch.last_line import Speaker
from parallel.watch.launch_history import PREFIX, LaunchHistory
from parallel.watch.process import die_with
from parallel.watch.progress import Progress
from parallel.watch.pulse import Pulse
from parallel.watch.watch import UNWATCHED, StoreWatch, Watch


@dataclass(frozen=True)
class Rendezvous:
    """The address of the store, hosted by the launcher or else by rank 0.

    `restarts` counts those of torchrun. `attempt` also differs where torchrun has started the ranks again since hosts
    have come or gone.
    """

    host: str
    port: int
    launcher_hosts: bool
    restarts: str
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
        restarts, size = (os.environ.get(key, "0") for key in ("TORCHELASTIC_RESTART_COUNT", "WORLD_SIZE"))
        attempt = f"{restarts}.{size}" if "TORCHELASTIC_RUN_ID" in os.environ else restarts
        return cls(host, int(port), launcher_hosts, restarts, attempt)


def leave_nccl_to_the_watch(timeout: timedelta) -> None:
    """Have NCCL's own watchdog end no process, so that the watch over the ranks names the lost one; before NCCL starts.

    It would abort the process with a traceback when the connection to a rank breaks, a second or two before the watch
    knows why; and after eight minutes in which it is not answered itself. What the user has set stays.
    """
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", f"{timeout.total_seconds():.0f}")


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


def store_of_groups() -> GroupStore | None:
    """Return the store in which the ranks of one attempt of torchrun meet; None: where torch itself looks for it.

    The agent's store keeps what an earlier attempt has left. Under the same keys a rank would read the addresses of
    processes that have ended, connect to them in vain, and fail.
    """
    found = Rendezvous.from_environment()
    if found is None or not found.launcher_hosts or "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return connect_to_store(found.host, found.port, hosts=False, prefix=f"groups/{found.attempt}")


def open_history() -> LaunchHistory:
    """Return the history of the launch that started this process; one that knows nothing where no launcher has."""
    found = Rendezvous.from_environment()
    if found is None or not found.launcher_hosts:
        return LaunchHistory()
    return LaunchHistory(connect_to_store(found.host, found.port, hosts=False, prefix=PREFIX), found.restarts)

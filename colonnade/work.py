"""The work of a command on a rank, and what the command knows of the launch when it prepares it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parallel.engine.context import Place
    from parallel.watch.launch_history import LaunchHistory
    from parallel.watch.watch import Watch
    from training.attempt import Attempt


@dataclass(frozen=True)
class Prepared:
    """The work of a rank, prepared and checked, before all ranks meet.

    `facts` returns what must be the same on all of them, and `work` is what each does then. `timeout` is
    `train.timeout_seconds`. `modules` are imported once for ranks that are started here.
    """

    facts: Callable[[], Mapping[str, Any]]
    timeout: float
    work: Callable[["Watch", "Attempt"], None]
    modules: Sequence[str]


@dataclass(frozen=True)
class Launch:
    """The place of this process, and the size of the world that it belongs to or is to start.

    `end_if_asked` ends the process if a signal has asked for that: long preparations call it again and again. `watch`
    is this rank's over the others. `history` tells of earlier attempts of the same launch.
    """

    place: "Place"
    world_size: int
    end_if_asked: Callable[[], object]
    watch: "Watch"
    history: "LaunchHistory"

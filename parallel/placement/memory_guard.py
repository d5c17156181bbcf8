"""The guard of a rank's memory: it says what a memory without room was asked for, when, and what would help."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from torch import nn

from parallel.chunk.chunk import Chunk
from parallel.config import Config
from parallel.errors import ConfigError, DiskFullError, NoRoomError, RoomError, first_line
from parallel.mesh.mesh import Mesh
from parallel.placement.held import held_tensors
from parallel.placement.memory_report import Shortage, report, use_of
from parallel.storage.no_room import Memory, asked_for, disk_problem, memory_without_room, no_room
from parallel.watch.process import rank_here

PHASES_OF_A_STEP = ("data", "forward", "backward", "transfer", "reduce", "update")


class MemoryGuard:
    """Explains the errors of a memory or a disk without room, for an engine of this module and these chunks.

    Before this process has completed a step they are RoomErrors, since the config does not fit, and later NoRoomErrors.
    They may be of one rank alone, whatever the other ranks wait for. `state_bytes` returns the bytes of a chunk's
    states, and `predicted` are the bytes that `--check` gives.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        state_bytes: Callable[[Chunk], int],
        config: Config,
        *,
        mesh: Mesh,
        module: nn.Module,
    ) -> None:
        self.chunks, self.state_bytes, self.config, self.mesh, self.module = chunks, state_bytes, config, mesh, module
        self.num_steps, self.predicted, self.has_stepped = 0, 0, False

    def after_step(self, num_steps: int) -> None:
        """Note that this many steps were taken, the last of them in this process."""
        self.num_steps, self.has_stepped = num_steps, True

    @contextmanager
    def explained(self, phase: Callable[[], str]) -> Iterator[None]:
        """Raise the error of a memory or a disk without room, in the block, as one that says what was held and what
        helps. `phase` names what the rank does.
        """
        try:
            yield
        except DiskFullError as error:
            if self.has_stepped:
                raise
            raise ConfigError(str(error)) from error
        except (NoRoomError, RoomError) as error:
            if isinstance(error, self.error):
                raise
            raise self.error(str(error)) from error
        except (RuntimeError, MemoryError, OSError) as error:
            memory = memory_without_room(error)
            if memory is not None:
                raise self.error(self._report(memory, error, phase())) from error
            if isinstance(error, OSError) and no_room(error):
                raise self.error(f"{self._who}: {self._when(phase())}: {disk_problem(error)}") from error
            raise

    @property
    def error(self) -> type[RoomError] | type[NoRoomError]:
        """The class of an error now."""
        return NoRoomError if self.has_stepped else RoomError

    @property
    def _who(self) -> str:
        return rank_here(self.mesh.world.rank)

    def _when(self, phase: str) -> str:
        if phase in PHASES_OF_A_STEP:
            return f"step {self.num_steps + 1}, {phase}"
        return f"{phase or 'work'} after step {self.num_steps}"

    def _report(self, memory: Memory, error: BaseException, phase: str) -> str:
        layer = layer_of(error.__traceback__, self.module, self.chunks)
        when = self._when(phase) + (f" of {layer}" if layer and phase in PHASES_OF_A_STEP else "")
        device = self.mesh.device
        words = first_line(error)
        shortage = Shortage(memory, device, self._who, when, asked_for(error), words, use_of(memory, device))
        held = held_tensors(self.chunks, self.state_bytes)
        replicas = self.mesh.axis("data").size
        return report(shortage, held, self.config, predicted=self.predicted, num_replicas=replicas)


def layer_of(trace: TracebackType | None, module: nn.Module, chunks: Sequence[Chunk]) -> str:
    """Return the name of the layer in whose forward an error was raised, by its parameters; else that of the innermost
    part of the module, or nothing.
    """
    units = {id(info.parameter): info.unit for chunk in chunks for info in chunk.infos}
    names = {id(part): name for name, part in module.named_modules() if name}
    layer = innermost = ""
    while trace is not None:
        part = trace.tb_frame.f_locals.get("self")
        if isinstance(part, nn.Module) and id(part) in names:
            innermost = names[id(part)]
            layer = units.get(id(next(part.parameters(), None)), "") or layer
        trace = trace.tb_next
    return layer or innermost

"""The base of all engines: the update of the weights, and what a checkpoint saves of it.

How gradients are computed is the subclasses' part.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from parallel.activations.offload import InputsOnHost
from parallel.checkpoint.saver import Saver, Writing
from parallel.chunk.chunk import Chunk
from parallel.chunk.writes import Writes
from parallel.config import Config
from parallel.engine.composition import Optimizer
from parallel.engine.context import Context
from parallel.engine.saved_state import WEIGHTS, kind_of, text_of
from parallel.errors import ColonnadeError, ModelError, NonFiniteError
from parallel.layout.finite import are_finite, problem_of
from parallel.layout.layout import Piece
from parallel.mesh.agreement import Agreement
from parallel.mesh.mesh import Axis, Mesh
from parallel.mesh.notices import Notices
from parallel.optim.grad_norm import clip_coefficient
from parallel.optim.loss_scale import LossScale
from parallel.optim.lr_schedule import learning_rate
from parallel.optim.step_counts import Outcome, StepCounts, found_inf, numbers_text
from parallel.optim.torch_optimizer import TorchOptimizer
from parallel.placement.initial import InitialPlacement
from parallel.placement.manager import PlacementManager
from parallel.placement.memory_guard import MemoryGuard
from parallel.storage.transfer import HostCopy, Tier
from parallel.tensor.scaling import Scaling

log = logging.getLogger(__name__)


class EngineBase:
    """The chunks of a module's parameters, their optimizer, and all that a checkpoint must know of both.

    `steps` counts the steps. `inputs` keeps the inputs of recomputed layers, where these are offloaded to the host.
    `scaling` has the scales of linears that multiply in 8 bits. `memory_guard` explains the errors of a memory without
    room.
    """

    def __init__(
        self,
        module: nn.Module,
        context: Context,
        chunks: Sequence[Chunk],
        optimizer: Optimizer,
        initial_placement: InitialPlacement,
    ) -> None:
        self.module, self.context = module, context
        self.chunks, self.optimizer = list(chunks), optimizer
        self.placement_manager = PlacementManager(
            self.chunks, optimizer, self.config.zero, self.mesh.world, initial_placement
        )
        self.inputs: InputsOnHost | None = None
        self.scaling: Scaling | None = None
        self._agreement = Agreement(self.mesh.world)
        copies = initial_placement.save_room.is_enough
        self.saver = Saver(self.mesh, self.chunks, self.notices, Writing(context.place.num_threads, copies))
        self.steps = StepCounts.of(self.config.train)
        self.writes = Writes(self.chunks, self.mesh.world)
        self.memory_guard = MemoryGuard(self.chunks, optimizer.state_bytes, self.config, mesh=self.mesh, module=module)

    @property
    def loss_scale(self) -> LossScale:
        """The factor of the loss, which is 1 unless the precision is fp16."""
        return self.steps.loss_scale

    @property
    def num_steps(self) -> int:
        """The number of steps that were taken, those that updated nothing included."""
        return self.steps.num_steps

    @property
    def num_updates(self) -> int:
        """The number of steps that updated the weights: the position in the schedule of the learning rate."""
        return self.steps.num_updates

    @property
    def config(self) -> Config:
        """The config of the context."""
        return self.context.config

    @property
    def mesh(self) -> Mesh:
        """The mesh of the context."""
        return self.context.mesh

    @property
    def data(self) -> Axis:
        """The axis of the replicas."""
        return self.mesh.axis("data")

    @property
    def notices(self) -> Notices:
        """The numbers that each agreement of this engine tells all ranks."""
        return self._agreement.notices

    def agree_on(self, action: str, problem: str = "", error: type[ColonnadeError] = ModelError) -> None:
        """Return when every rank has called this for the same action, such as "a checkpoint", without a problem.

        Everything that ranks do together begins with it. Raises ModelError on every rank where one does something else,
        and `error` where one has a problem; LostRankError where one has ended.
        """
        self._agreement.agree_on(action, problem, error)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Return a context for long work of this rank alone, which is no silence while the others wait for it."""
        return self.mesh.watch.phase(name)

    def train(self, mode: bool = True) -> None:
        """Put the module into training mode or, with False, into evaluation mode, as torch's `train` does."""
        self.module.train(mode)

    def eval(self) -> None:
        """Put the module into evaluation mode."""
        self.train(False)

    @property
    def stop_signal(self) -> int | None:
        """The number of a signal that asks this run to end, or None; see `parallel.catch_signals`.

        It is that of the last agreement of all ranks, so the same on every rank after each step.
        """
        return self.notices.of_all("signal") or None

    @property
    def lr(self) -> float:
        """The learning rate of the next update: that of an optimizer which was passed, else the config's schedule."""
        if isinstance(self.optimizer, TorchOptimizer):
            return self.optimizer.lr
        schedule, rate = self.config.lr_scheduler, self.config.optimizer.lr
        return learning_rate(schedule, rate, self.num_updates, self.config.train.steps)

    @property
    def hyperparameters(self) -> str:
        """The values of the optimizer that all ranks must have in common in the next step, as text."""
        if isinstance(self.optimizer, TorchOptimizer):
            return self.optimizer.groups.hyperparameters()
        return f"learning rate {self.lr}"

    @property
    def has_gradients(self) -> bool:
        """True between a backward and its step, where an engine lets its user do anything in between."""
        return False

    def state(self) -> dict[str, list[Piece]]:
        """Return all weights, also frozen ones, and all tensors that a step changes, as pieces by kind.

        A checkpoint saves them, and loads into them.
        """
        found = self.optimizer.pieces()
        frozen = [piece for c in self.chunks if c.is_frozen for piece in c.spec.pieces(c.master)]
        return found | {"master": found["master"] + frozen}

    def state_pieces(self, *, owned: bool = False) -> list[Piece]:
        """Return the pieces of `state` in one list, each named KIND/NAME; `owned`: only those that this rank saves."""
        mine = {(piece.name, piece.box) for piece in self.weights()} if owned else None
        return [
            Piece(f"{kind}/{piece.name}", piece.shape, piece.box, piece.data)
            for kind, pieces in self.state().items()
            for piece in pieces
            if piece.data.numel() and (mine is None or (piece.name, piece.box) in mine)
        ]

    def counters(self) -> dict[str, Any]:
        """Return all else that a step changes, as values for JSON: a checkpoint saves them beside `state`."""
        return self.steps.state() | {"placement": self.placement_manager.state()}

    def restore(self, counters: Mapping[str, Any], *, steps: Mapping[str, float] | None = None) -> None:
        """Go on from where `counters` were saved; the pieces of `state` must hold what they held then.

        `steps` has the number of updates of each parameter that has had another number than the others.
        """
        self.steps.restore(counters)
        self.mesh.watch.progress.step = self.memory_guard.num_steps = self.num_steps
        self.optimizer.restore(self.num_updates, steps=steps)
        self.write_back()
        self.placement_manager.restore(counters.get("placement", {}))
        self.writes.note()

    def write_back(self) -> None:
        """Write the master weights, which a checkpoint was loaded into, back to the parameters."""
        for chunk in self.chunks:
            chunk.write_back().wait()

    def weights(self) -> list[Piece]:
        """Return the pieces that this rank owns of the model's weights, in the precision of the master weights.

        Every rank calls this. Raises ModelError where ranks have written different values into their parameters.
        """
        self.agree_on("its weights")
        if self.writes.is_on:
            self.writes.take_if_any()
        for chunk in self.chunks:
            chunk.settle()
        return [piece for chunk in self.chunks if chunk.spec.is_owner for piece in chunk.spec.pieces(chunk.master)]

    def held(self) -> dict[Tier, int]:
        """Return the bytes of this rank's model data on each tier, between two steps.

        These are parameters, the memory for gradients on the host, master weights and moments, and the host's buffers
        for states that are on a disk, and the copies that a save in the background makes.
        """
        found = dict.fromkeys(Tier, 0)
        for tier, x in [*self.optimizer.held(), *(pair for chunk in self.chunks for pair in chunk.held())]:
            found[tier] += min(x.nbytes, x.untyped_storage().nbytes())
        for disk in {chunk.memory.disk for chunk in self.chunks if chunk.memory.disk is not None}:
            found[Tier.HOST] += disk.buffer_bytes
        found[Tier.HOST] += self.saver.host_bytes
        return found

    def _clip_coefficient(self, norm: Tensor) -> Tensor:
        """Return the number that gradients of this norm are multiplied by, a scalar."""
        return clip_coefficient(norm, self.config.train.clip_grad_norm)

    def check_finite(self, consequence: str, *, states: bool = False) -> None:
        """Return when every rank has found all its weights finite; with `states`, the optimizer's states too.

        Each number is read once, where it is; those on a disk are read from there. Every rank calls this. Raises
        NonFiniteError on every rank, with the rank and the tensor, where one is not finite; the message ends with the
        `consequence`.
        """
        for chunk in self.chunks:
            chunk.settle()
        flat = [chunk.master for chunk in self.chunks] + [x for _, x in self.optimizer.held() if states]
        more = self._buffers_to_check()
        problem = ""
        if not all(are_finite([*flat, *(piece.data for piece in more)])):  # few large buffers; names only where needed
            masters = [piece for chunk in self.chunks for piece in chunk.spec.pieces(chunk.master)]
            named = [replace(x, name=text_of(x.name)) for x in self.state_pieces() if kind_of(x.name) not in WEIGHTS]
            problem = problem_of([*masters, *more, *(named if states else [])])
        problem = problem and f"after step {self.num_steps} {problem}. {consequence}"
        self._agreement.agree_on(f"a check of the weights after step {self.num_steps}", problem, NonFiniteError)

    def _buffers_to_check(self) -> list[Piece]:
        """Return all that must be finite on this rank beside weights and states."""
        return []

    def _update(self, norm: Tensor, divisor: float, written: HostCopy, loss: Tensor) -> None:
        """Launch the update of all weights by gradient / `divisor`, clipped; `norm` is the global norm of this.

        Where the norm or `loss`, any sum of the losses of the step, is not finite, the update changes nothing on any
        rank; the host does not wait for it, and `_end_step` tells it. `written` is the sum over ranks of
        `Writes.changed`: values that somebody has written into parameters are taken over first.
        """
        self.placement_manager.before_update()
        if written.wait().item():
            self.writes.take()
        self.optimizer.step(self._clip_coefficient(norm) / divisor, self.lr, found_inf(norm, loss))
        self.writes.note()  # now: the host has nothing else to do until the gradients are computed

    def _end_step(self, loss: float, norm: float) -> Outcome:
        """Count a step by the numbers that its update was launched with, and return what it has come to."""
        outcome = self.steps.count(loss, norm)
        is_updated = outcome is Outcome.UPDATED
        if self.scaling is not None:
            self.scaling.take_outcome(is_updated=is_updated)
        if not is_updated:
            self.optimizer.take_back()
        self.mesh.watch.progress.step = self.num_steps
        self.placement_manager.after_step(skipped=not is_updated)
        self.writes.note_moved()
        return outcome

    def _report(self, outcome: Outcome, loss: float | None, norm: float, origin: Callable[[], str]) -> None:
        """Log a step that was left out, or raise NonFiniteError where the run ends by it, on every rank.

        `origin` is called then on all ranks together, and returns where the number came from.
        """
        if outcome not in (Outcome.LEFT_OUT, Outcome.STOPS):
            return
        what = f"step {self.num_steps}: {numbers_text(loss, norm)}"
        if outcome is Outcome.LEFT_OUT:
            text = f"{what}: the step is left out ({self.steps.in_a_row} in a row, {self.steps.num_left_out} in all)"
            if self.mesh.world.rank == 0:
                log.warning("%s", text)
                self.steps.say(text)
            return
        in_a_row = f" {self.steps.in_a_row} steps in a row were left out." if self.steps.policy == "skip" else ""
        error = NonFiniteError(
            f"{what}: {origin()}{in_a_row} Nothing was updated, and no checkpoint is written. Try a smaller"
            " optimizer.lr, or other data.",
            loss=loss,
            grad_norm=norm,
        )
        error.phase = "a train step"
        raise error

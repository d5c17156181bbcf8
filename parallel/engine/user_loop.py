"""The part of an engine of any module that a loop of the user's own calls: forward, backward and step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from parallel.engine.origin import chunks_not_finite, parts_text
from parallel.engine.parameter_access import ParameterAccess
from parallel.engine.results import UpdateResult
from parallel.layout.finite import problem_of
from parallel.mesh.collectives import gather_objects
from parallel.modules.inputs import map_tensors
from parallel.modules.kept_buffers import KeptBuffers
from parallel.modules.loss import loss_problem
from parallel.modules.shares import LossWeights
from parallel.optim.grad_norm import norm_and_sum
from parallel.optim.step_counts import Outcome
from parallel.storage.transfer import HostCopy, to_device


class UserLoop(ParameterAccess):
    """The part of a `ModuleEngine` that computes a forward, a backward and a step, each when the user says so."""

    loss_weights: LossWeights
    _synchronizes: bool
    _kept: KeptBuffers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output for these inputs.

        Tensors are moved to this rank's device, and floating-point ones cast to the config's precision. Raises
        ModelError, on every rank, where the module was changed since the engine took it over, or where ranks do not run
        the same layers; RoomError or NoRoomError where a memory has no room, perhaps on this rank alone.
        """
        args, kwargs = map_tensors(self._input, (args, kwargs))
        self._kept.begin()
        with self.memory_guard.explained(lambda: "forward"), self._passes.explain_transforms():
            return self.module(*args, **kwargs)

    def backward(self, loss: Any, *, retain_graph: bool = False) -> None:
        """Add the gradients of this loss, averaged over replicas, to those since the last step.

        The loss is a mean over samples: where the loader that `initialize` returned gave this replica more or fewer
        samples than others, it is weighted by the share. Raises ModelError, on every rank, for a loss that is not a
        scalar with a gradient or whose share is not known, and where ranks do different things; RoomError or
        NoRoomError where a memory has no room, perhaps on this rank alone.
        """
        weight, problem = self.loss_weights.backward()
        self._passes.begin_backward(loss_problem(loss) or problem or self._problem_of_a_backward())
        if weight:
            self._lost = self._lost + 0.0 * loss.detach().double().reshape(())
        with self._gradients.backward(synchronizes=self._synchronizes), self.memory_guard.explained(lambda: "backward"):
            (loss * (self.loss_scale.scale * weight)).backward(retain_graph=retain_graph)
        self._passes.end_backward(retains_graph=retain_graph)

    def step(self) -> UpdateResult:
        """Clip the gradients, update the weights, then drop the gradients.

        A parameter that had no gradient on any rank stays as it is. Raises ModelError on every rank where one does
        something else; NonFiniteError, on every rank, for a loss or a norm that is not finite, as `train.nonfinite`
        says: then nothing has been updated, and the message names the layers and the ranks whose gradients, or the
        weights that, are not finite. (The forwards are the user's, and are not run again.)
        """
        return self._step(self._parts_not_finite)

    def write_back(self) -> None:
        """Do as `EngineBase.write_back`, and drop gradients and what was gathered of the weights before."""
        self._passes.release()
        self.zero_grad()
        self._kept.end(is_left_out=False)
        super().write_back()

    @property
    def has_gradients(self) -> bool:
        """True if gradients have arrived since the last step on this rank."""
        return bool(self._gradients.arrived().any())

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Have gradients add up on this rank alone in the block, as DDP's no_sync does.

        The next backward after it, or a step, sums them over replicas. In ZeRO stages 2 and 3, where no rank keeps a
        whole gradient, each is summed at once: the result is the same.
        """
        before, self._synchronizes = self._synchronizes, False
        try:
            yield
        finally:
            self._synchronizes = before

    # -- details

    def _step(self, origin: Callable[[], str], divisor: float = 1.0, loss: float | None = None) -> UpdateResult:
        """Do a step with the gradients divided by this number.

        `loss` is that of the whole step, where it is known. Where it or the norm is not finite, `origin` says why.
        """
        self._agreement.agree_on(f"a step with {self.hyperparameters}", self._original.in_use)
        self.saver.check()
        self._passes.release()
        self._gradients.finish()
        divisor *= self._divisor
        self.writes.take_replaced()
        sums = torch.stack([self.writes.changed(), self._lost])
        norm, (num_written, lost) = norm_and_sum(self._trained, self.mesh.world, sums)
        norm = norm / divisor
        lost = lost if loss is None else torch.full_like(lost, 0.0 * loss)
        on_host = HostCopy(torch.stack([norm, lost]))
        lr = self.lr
        self.optimizer.unused = self._unused()
        with self.memory_guard.explained(lambda: "update"):
            self._update(norm, divisor, HostCopy(num_written), lost)
        self.zero_grad()
        found, lost_on_host = on_host.wait().tolist()
        outcome = self._end_step(lost_on_host, found)
        self._passes.end_step()
        self._kept.end(is_left_out=outcome is Outcome.LEFT_OUT)
        self._report(outcome, lost_on_host if loss is None else loss, found, origin)
        self.memory_guard.after_step(self.num_steps)
        skipped = outcome is not Outcome.UPDATED
        return UpdateResult(None if skipped else found, lr, skipped, self.steps.num_left_out)

    def _parts_not_finite(self) -> str:
        """Return which gradients and which weights are not finite, after a step whose forwards were the user's."""
        suspects = chunks_not_finite(self._trained, self.mesh.world)
        for chunk in self.chunks:
            chunk.settle()
        own = problem_of([piece for chunk in self.chunks for piece in chunk.spec.pieces(chunk.master)])
        weights = [f"rank {rank}: {x}" for rank, x in enumerate(gather_objects(own, self.mesh.world)) if x]
        return parts_text(suspects) + (f" Weights: {'; '.join(weights)}." if weights else " All weights are finite.")

    def _input(self, x: Tensor) -> Tensor:
        moved = to_device(x, self.mesh.device)
        moved = moved.to(self.context.dtype) if x.is_floating_point() else moved
        self.context.shares.copied(x, moved)
        return moved

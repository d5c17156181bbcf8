"""Access by hand to the parameters and the gradients of an engine of any module."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isnan

import torch
from torch import Tensor, nn

from parallel.chunk.chunk import Chunk
from parallel.chunk.managed import manage
from parallel.engine.module_state import ModuleState
from parallel.errors import ColonnadeError, ModelError
from parallel.mesh.agreement import Agreement
from parallel.mesh.collectives import all_reduce
from parallel.modules.full_parameters import FullParameters, whole_gradients
from parallel.modules.manager import DropGradients, ParameterManager
from parallel.modules.parameters import OriginalParameters
from parallel.modules.passes import ModulePasses
from parallel.optim.grad_norm import global_norm
from parallel.optim.gradients import ModuleGradients
from parallel.optim.torch_optimizer import TorchOptimizer

NOT_OF_THE_MODEL = "full_parameters: the module is not a part of the model. Pass engine.module or a part of it."
IN_USE = "engine.full_parameters: nothing is computed or saved in this context. Leave it first."
IN_FORWARD = "engine.full_parameters and the like are not for a forward. Call them before or after it."
READ_ONLY = "full_parameters: values were set in it, and are dropped. Use full_parameters(writable=True)."
GRADIENTS_READ_ONLY = "full_gradients: they are copies to be read, and were changed. engine.clip_grad_norm_ clips them."
CLIPPED = "a backward after engine.clip_grad_norm_: call that once all gradients of the step have been computed."


class ParameterAccess(ModuleState):
    """The part of a `ModuleEngine` that gives access to whole parameters and gradients, and clips by hand."""

    _agreement: Agreement
    _passes: ModulePasses
    _original: OriginalParameters
    _gradients: ModuleGradients
    _trained: Sequence[Chunk]
    _manager: ParameterManager
    _clipped: Tensor | None = None  # what `clip_grad_norm_` has found, until the step
    _lost: Tensor  # fp64, 0 or, once a backward has begun at a loss that is not finite, NaN

    @contextmanager
    def full_parameters(self, module: nn.Module | None = None, writable: bool = False) -> Iterator[dict[str, Tensor]]:
        """Enter a context in which parameters are whole on every rank, by name, to be read or, if `writable`, set.

            with engine.full_parameters(writable=True) as weights:
                weights["head.weight"].zero_()

        The names are those of `model.named_parameters()`; a `module` that is a part of the model leaves out all
        parameters outside of it. The tensors are copies in the precision of the master weights. The model's own
        parameters are whole too, in their precision, so that `load_state_dict`, `state_dict` and `deepcopy` work in
        every stage. Rank 0's values count, and are given to every rank when the context ends. If the block raises an
        error on any rank, everything is as before. The optimizer's moments stay as they are.

        Every rank enters and leaves it together. Raises ModelError, on every rank, in a forward, within another such
        context, where something was written without `writable`, and where the block failed on another rank.
        """
        part = self.module if module is None else module
        parameters = set(part.parameters())
        problem = "" if parameters <= set(self.module.parameters()) else NOT_OF_THE_MODEL
        action = f"full_parameters of {len(parameters)} parameters" + (", to write" if writable else "")
        self.agree_on(action, self._access_problem() or problem)
        self._passes.release()
        self.writes.take_if_any()
        full = FullParameters(self.chunks, parameters)
        self._original.in_use, error = IN_USE, None
        try:
            yield full.named
        except Exception as raised:
            error = raised
        finally:
            self._original.in_use = ""
            problem = full.close() or self._original.change()
        problem = f"full_parameters: {type(error).__name__}: {error}" if error is not None else problem
        if not (problem or writable) and full.was_written():
            problem = READ_ONLY
        try:
            self._agreement.agree_on("the end of full_parameters", problem)
        except ColonnadeError as told:
            self.writes.note()
            raise error or told from None
        if writable:
            full.write()
        self.writes.note()

    @contextmanager
    def full_gradients(self) -> Iterator[dict[str, Tensor | None]]:
        """Enter a context in which gradients are whole on every rank, by name, to be read after a backward.

        They are the sums of all backwards since the last step, averaged over replicas, in the precision of the master
        weights, and without the loss scale; None for a parameter that has had no gradient on any rank. They are copies,
        and the step is as it would be without them. Every rank enters it together. Raises ModelError on every rank
        where one does something else, or where they were changed.
        """
        self.agree_on("full_gradients")
        unused = self._unused()
        if len(unused) == sum(len(chunk.infos) for chunk in self._trained):
            yield {info.name: None for chunk in self.chunks for info in chunk.infos}
            return
        self._gradients.finish()
        found = whole_gradients(self.chunks, unused, self._divisor)
        versions = [x._version for x in found.values() if x is not None]
        yield found
        changed = versions != [x._version for x in found.values() if x is not None]
        self._agreement.agree_on("the end of full_gradients", GRADIENTS_READ_ONLY if changed else "")

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the gradients of the coming step by their norm over all ranks, and return that norm before clipping.

        It is called as torch's `clip_grad_norm_`, after the last backward of a step, and takes the place of the
        config's `train.clip_grad_norm` for this step. The result is an fp64 scalar, the same on every rank. Raises
        ModelError, on every rank, for a `norm_type` other than 2, for a `max_norm` that is no number from 0 on, and
        with `error_if_nonfinite` for a norm that is not finite.
        """
        problem = ""
        if norm_type != 2:
            problem = f"clip_grad_norm_: norm_type={norm_type!r} is not known. Use 2.0."
        elif isnan(max_norm) or max_norm < 0:
            problem = f"clip_grad_norm_: max_norm={max_norm!r} is not a number from 0 on. Try 1.0."
        self.agree_on(f"clip_grad_norm_ by {float(max_norm)!r}", problem)
        self._gradients.finish()
        clipped = torch.ones((), dtype=torch.float64, device=self.mesh.device)
        clipped = clipped if self._clipped is None else self._clipped
        norm = global_norm(self._trained, self.mesh.world) / self._divisor * clipped
        if error_if_nonfinite and not norm.isfinite():
            raise ModelError(f"clip_grad_norm_: the norm of the gradients is {norm.item()}.")
        self._clipped = clipped * (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def __reduce_ex__(self, protocol: object) -> str:
        """Raise ModelError: an engine is not copied."""
        raise ModelError(
            "engine: it cannot be copied or pickled. engine.save_checkpoint(folder) saves its state, and"
            " copy.deepcopy(engine.module) copies the model."
        )

    def agree_on(self, action: str, problem: str = "", error: type[ColonnadeError] = ModelError) -> None:
        """Do as `EngineBase.agree_on`; in `full_parameters` and in a forward every action is a problem."""
        super().agree_on(action, problem or self._access_problem(), error)

    # -- details

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients since the last step, whatever `set_to_none` is."""
        self._gradients.begin()
        self._clipped = None
        self._lost = torch.zeros((), dtype=torch.float64, device=self.mesh.device)

    @property
    def _divisor(self) -> float:
        """The number that sums of gradients are divided by."""
        return self.loss_scale.scale * self.data.size

    def _clip_coefficient(self, norm: Tensor) -> Tensor:
        return super()._clip_coefficient(norm) if self._clipped is None else self._clipped

    def _access_problem(self) -> str:
        return (IN_FORWARD if self._passes.is_in_forward else "") or self._original.change()

    def _problem_of_a_backward(self) -> str:
        """Return a message about a backward whose gradients would not be clipped with those before, or none."""
        return "" if self._clipped is None else CLIPPED

    def _take_over(self) -> None:
        """Have the module's parameters and the passed optimizer say what the engine keeps, and what to call instead."""
        self._manager = ParameterManager(self._gradients, self.chunks)
        manager = weakref.ref(self._manager)
        manage(self.module.parameters(), manager)
        zero_grad = weakref.WeakMethod(self.zero_grad)
        self.module.zero_grad = DropGradients(zero_grad)  # type: ignore[method-assign]
        if isinstance(self.optimizer, TorchOptimizer):
            self.optimizer.take_over(manager, DropGradients(zero_grad))

    def _unused(self) -> set[nn.Parameter]:
        """Return the parameters that have had no gradient since the last step, on any rank."""
        arrived = all_reduce(self._gradients.arrived(), self._agreement.axis).tolist()
        parameters = [info.parameter for chunk in self._trained for info in chunk.infos]
        return {parameter for parameter, count in zip(parameters, arrived, strict=True) if not count}

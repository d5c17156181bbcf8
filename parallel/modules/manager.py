"""The keeper of a module's parameters under an engine: it answers for values and gradients that are not there."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from parallel.chunk.chunk import Chunk
from parallel.optim.gradients import ModuleGradients


class ParameterManager:
    """Knows whether parameters have gradients, in an engine's buffers, and whether they have values now."""

    def __init__(self, gradients: ModuleGradients, chunks: Sequence[Chunk]) -> None:
        self._gradients = gradients
        self._of = {info.parameter: (info.name, chunk) for chunk in chunks for info in chunk.infos}

    def gradient_problem(self, parameter: nn.Parameter) -> str:
        """Return what to do instead of using `.grad`, or an empty string if there is no gradient now."""
        name, chunk = self._of.get(parameter, ("a parameter of the optimizer", None))
        if not self._gradients.has_any or (chunk is not None and chunk.is_frozen):
            return ""
        return (
            f"{name}.grad: the engine keeps the gradients, summed over ranks, so .grad is empty. Read them in"
            " `with engine.full_gradients()`, clip them by engine.clip_grad_norm_(max_norm), drop them by"
            " engine.zero_grad(). Instead of GradScaler set train.precision='fp16'."
        )

    def value_problem(self, parameter: nn.Parameter) -> str:
        """Return what to do instead of copying the parameter, or an empty string if it has its values now."""
        name, chunk = self._of.get(parameter, ("a parameter of the optimizer", None))
        if chunk is None or not chunk.parameters.has_placeholder(parameter):
            return ""
        return (
            f"{name}: it cannot be copied or pickled, since this rank does not have its values (zero.stage=3, or"
            " parameters on the host). Do it in `with engine.full_parameters()`."
        )


class DropGradients:
    """Takes the place of the `zero_grad` of a module or an optimizer: it drops the engine's gradients.

    `drop` is a weak reference to the function that does so.
    """

    def __init__(self, drop: Callable[[], Callable[[], None] | None]) -> None:
        self._drop = drop

    def __call__(self, *_: Any, **__: Any) -> None:
        drop = self._drop()
        if drop is not None:
            drop()

"""Parameters whose values and gradients an engine keeps: they say so where torch would find nothing."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from parallel.errors import ModelError

MANAGER = "_manager"
_GRAD: Any = vars(torch._C.TensorBase)["grad"]  # the attribute of C++, past the property below


class Manager(Protocol):
    """The keeper of parameters' values and gradients."""

    def gradient_problem(self, parameter: nn.Parameter) -> str:
        """Return what to do instead of using `.grad`, or an empty string if there is no gradient now."""

    def value_problem(self, parameter: nn.Parameter) -> str:
        """Return what to do instead of copying the parameter, or an empty string if it has its values now."""


class ManagedParameter(nn.Parameter):
    """The class of a parameter that an engine manages. Its `.grad` is None while it has no gradient, as in torch; from
    a backward to the step, when the engine has the gradient, it raises ModelError. Torch's utilities would take None
    for "no gradient", and do nothing. A copy, also through pickle, is an ordinary parameter with memory of its own.

    Hooks that run in a backward see the gradient of that backward in `.grad`, as in torch.
    """

    @property
    def grad(self) -> Tensor | None:
        """The gradient that a backward has just put here; else None, or ModelError if the engine has one."""
        gradient: Tensor | None = _GRAD.__get__(self)
        if gradient is None:
            _refuse(self, "gradient_problem")
        return gradient

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:
        if _GRAD.__get__(self) is None:
            _refuse(self, "gradient_problem")
            if gradient is not None:
                raise ModelError(
                    "parameter.grad = ...: the engine updates by the gradients that engine.backward(loss) has computed."
                    " Put a term that has this gradient into the loss."
                )
        _GRAD.__set__(self, gradient)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(nn.Parameter(self.detach(), self.requires_grad))

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        """Return an ordinary parameter with a copy of the values. Raises ModelError where there are none."""
        if id(self) not in memo:
            memo[id(self)] = self._plain()
        found: nn.Parameter = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)

    def _plain(self) -> nn.Parameter:
        _refuse(self, "value_problem")
        return nn.Parameter(self.detach().clone(memory_format=torch.preserve_format), self.requires_grad)


def manage(parameters: Iterable[nn.Parameter], manager: Callable[[], Manager | None]) -> None:
    """Make these ordinary parameters managed ones. Parameters of a class of the user's own stay as they are.

    `manager` is a weak reference: a parameter may outlive its engine.
    """
    for parameter in parameters:
        if type(parameter) in (nn.Parameter, ManagedParameter):
            setattr(parameter, MANAGER, manager)
            parameter.__class__ = ManagedParameter


def problem_of_another_engine(module: nn.Module) -> str:
    """Return a message about the first parameter that another engine manages, or an empty string.

    Two engines would take the parameters from each other: each has them as views of its own buffers.
    """
    for name, parameter in module.named_parameters():
        if hasattr(parameter, MANAGER):
            return (
                f"model: {name} has an engine already. Two engines cannot share a parameter: put both models into one"
                " module, with param groups for each. For a new engine make the model anew, or pass"
                " copy.deepcopy(engine.module), made in `with engine.full_parameters()`."
            )
    return ""


def _refuse(parameter: nn.Parameter, question: str) -> None:
    """Raise ModelError where the parameter's manager has an answer to this question."""
    manager = getattr(parameter, MANAGER, lambda: None)()
    problem = getattr(manager, question)(parameter) if manager is not None else ""
    if problem:
        raise ModelError(problem)

"""The optimizers of torch's that update every element by itself, and the states with which they begin."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parallel.errors import ModelError, either

ELEMENTWISE: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.ASGD,
    torch.optim.Rprop,
)


def refuse_unless_elementwise(inner: torch.optim.Optimizer) -> None:
    """Raise ModelError for an optimizer that is not known to update every element by itself.

    A subclass is known if it inherits the step of a class that is.
    """
    bases = [base for base in ELEMENTWISE if isinstance(inner, base)]
    known = either(cls.__name__ for cls in ELEMENTWISE)
    if not bases:
        raise ModelError(
            f"optimizer: {type(inner).__name__} is not known to update every element by itself. Use {known}."
        )
    if not any(_is_inherited(type(inner), base) for base in bases):
        raise ModelError(
            f"optimizer: {type(inner).__name__} has a step of its own, which is not known to update every element by"
            f" itself. Inherit the step, or use {known}."
        )
    if any(group.get("differentiable") for group in inner.param_groups):
        raise ModelError("optimizer: differentiable=True is for a step within a graph. Use differentiable=False.")


DECIDING = ("amsgrad", "momentum", "centered")
"""The fields of a param group that decide which states its parameters have."""


def state_kinds(inner: torch.optim.Optimizer, fields: Mapping[str, Any]) -> list[str]:
    """Return the names of the states with a value for each element that parameters have in a group of these fields.

    They are those after a step of a small optimizer of the same class.
    """
    tried = nn.Parameter(torch.zeros(2))
    tried.grad = torch.zeros(2)
    base: Any = next(base for base in ELEMENTWISE if isinstance(inner, base))
    small = base([tried])
    small.param_groups[0] |= {key: fields[key] for key in DECIDING if key in fields}
    small.step()
    return [kind for kind, x in small.state[tried].items() if isinstance(x, Tensor) and x.shape == tried.shape]


def initial_value(kind: str, group: dict[str, Any]) -> float:
    """Return the number with which torch fills a state of this name before a parameter's first update."""
    match kind:
        case "step_size" | "eta":  # Rprop, ASGD
            return float(group["lr"])
        case "mu" | "mu_product":  # ASGD, NAdam
            return 1.0
        case "sum":  # Adagrad
            return float(group["initial_accumulator_value"])
        case _:
            return 0.0


def _is_inherited(cls: type[torch.optim.Optimizer], base: type[torch.optim.Optimizer]) -> bool:
    """Return whether a class does its steps as `base` does: torch wraps the step of each class that is used."""
    return all(inspect.unwrap(getattr(cls, x)) is inspect.unwrap(getattr(base, x)) for x in ("step", "_init_group"))

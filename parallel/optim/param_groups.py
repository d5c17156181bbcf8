"""The param groups of a torch optimizer, in a checkpoint: every field of each, and the names of its parameters."""

import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallel.errors import CheckpointError, names_text, shown
from parallel.layout.layout import ParameterInfo

WAYS_TO_COMPUTE = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""The fields that say which kernels an update uses: they depend on the device, not on what was learned."""

NOT_FIELDS = WAYS_TO_COMPUTE | {"params", "param_names"}
"""The entries of a group that are not saved as its fields; its parameters are saved by their public names."""


@dataclass(frozen=True)
class SavedGroup:
    """A param group without its tensors: the public names of its parameters, and its fields."""

    names: Sequence[str]
    fields: Mapping[str, Any]


class ParamGroups:
    """The param groups of an optimizer, with the public names of the parameters that it was made for."""

    def __init__(self, inner: torch.optim.Optimizer, infos: Sequence[ParameterInfo]) -> None:
        self.inner = inner
        self._names = {info.parameter: info.names for info in infos}
        self.names: list[list[str]] = []
        for group in inner.param_groups:
            self.add(group["params"])

    def repeated(self, parameters: Sequence[nn.Parameter]) -> list[str]:
        """Return the names of those of these parameters that a group has, or that are twice among them."""
        given = [name for parameter in parameters for name in self._names.get(parameter, ())]
        present = {name for names in self.names for name in names}
        return [name for i, name in enumerate(given) if name in present or name in given[:i]]

    def add(self, parameters: Iterable[nn.Parameter]) -> None:
        """Note a group of these parameters of the model, which comes after the others."""
        self.names.append([name for parameter in parameters for name in self._names.get(parameter, ())])

    def state(self) -> list[SavedGroup]:
        """Return each group's names, and all of its fields."""
        return [
            SavedGroup(names, {k: v for k, v in group.items() if k not in NOT_FIELDS})
            for names, group in zip(self.names, self.inner.param_groups, strict=True)
        ]

    def hyperparameters(self) -> str:
        """Return as text what all ranks must have in common in a step: the first group's learning rate, the number of
        groups, and every value of the optimizer's own fields that is not its default.
        """
        groups, defaults = self.inner.param_groups, self.inner.defaults
        rate = _plain(groups[0]["lr"])
        found = [f"learning rate {rate}"] + ([f"{len(groups)} param groups"] if len(groups) > 1 else [])
        for i, group in enumerate(groups):
            now = {key: group[key] for key in sorted(defaults.keys() - WAYS_TO_COMPUTE) if key in group}
            others = {k: _plain(x) for k, x in now.items() if _has_tensors(x) or x != defaults[k]}
            found += [f"[{i}] {k} {x}" for k, x in others.items() if (k, x) != ("lr", rate)]
        return ", ".join(found)

    def restore(self, saved: Mapping[int, SavedGroup]) -> None:
        """Set the fields of these groups, by their numbers. A tensor stays the same tensor, with the saved values."""
        for i, one in saved.items():
            group = self.inner.param_groups[i]
            group |= {key: _restored(group.get(key), value) for key, value in one.fields.items()}


def _plain(x: Any) -> Any:
    """Return a number in place of a tensor that has one, also in a tuple."""
    if isinstance(x, tuple | list):
        return tuple(_plain(item) for item in x)
    return x.item() if isinstance(x, Tensor) and x.numel() == 1 else x


def _has_tensors(x: Any) -> bool:
    return any(isinstance(item, Tensor) for item in (x if isinstance(x, tuple | list) else [x]))


def _restored(now: Any, saved: Any) -> Any:
    """Return the saved value: in the tensors that are there now, and a number where there is a number now."""
    if isinstance(now, Tensor) and isinstance(saved, Tensor | int | float):
        shape = saved.shape if isinstance(saved, Tensor) else now.shape
        if shape == now.shape:
            with torch.no_grad():
                return now.copy_(saved) if isinstance(saved, Tensor) else now.fill_(saved)
    if isinstance(now, int | float) and isinstance(saved, Tensor) and saved.numel() == 1:
        return saved.item()
    if isinstance(now, list | tuple) and isinstance(saved, list | tuple) and len(now) == len(saved):
        return type(saved)(_restored(a, b) for a, b in zip(now, saved, strict=True))
    return saved


def check_fields(saved: Sequence[SavedGroup], now: Sequence[SavedGroup], *, own: Set[str]) -> None:
    """Raise CheckpointError for a saved field with which the optimizer could not compute: today's is a number, or some
    numbers, and the saved one is not, or is not finite. `own` are the names of the optimizer's own fields.
    """
    for i, (then, today) in enumerate(zip(saved, now, strict=False)):
        for key in sorted(own & then.fields.keys() & today.fields.keys()):
            if not _can_replace(value := then.fields[key], today.fields[key]):
                raise CheckpointError(
                    f"the checkpoint is damaged, or of another program: its param_groups[{i}] has {shown(value)} as"
                    f" {key!r}, and the optimizer {shown(today.fields[key])}."
                )


def _can_replace(saved: Any, now: Any) -> bool:
    if isinstance(now, list | tuple):
        is_long = isinstance(saved, list | tuple) and len(saved) == len(now)
        return is_long and all(map(_can_replace, saved, now))
    return _is_number(saved) or not _is_number(now)


def _is_number(x: Any) -> bool:
    """Return whether this is a number that is finite as a float, or a tensor with such a number."""
    x = _plain(x)
    return isinstance(x, int | float) and abs(x) <= sys.float_info.max


def group_problems(
    saved: Sequence[SavedGroup], now: Sequence[SavedGroup], *, frozen: Set[str]
) -> tuple[list[str], dict[int, SavedGroup]]:
    """Return messages about groups that differ, and the saved groups that have the parameters of today's, by number.

    Parameters that are `frozen`, now or when they were saved, may be in any group or in none: they are not updated.
    """
    problems, matching = [], {}
    if len(saved) != len(now):
        problems.append(f"the checkpoint has {len(saved)} param groups, the optimizer {len(now)}")
    for i, (then, today) in enumerate(zip(saved, now, strict=False)):
        names = [set(group.names) - frozen for group in (then, today)]
        if names[0] == names[1]:
            matching[i] = then
        else:
            problems += _two_sided(f"param_groups[{i}]", "parameters", *names)
        problems += _two_sided(f"param_groups[{i}]", "fields", set(then.fields), set(today.fields))
    return problems, matching


def _two_sided(where: str, what: str, saved: Set[str], now: Set[str]) -> list[str]:
    """Return messages about the names that only one side has."""
    sides = (("the checkpoint", saved - now, "the optimizer"), ("the optimizer", now - saved, "the checkpoint"))
    hint = "; a scheduler adds fields: make it before you load" if what == "fields" else ""
    return [
        f"{where}: {one} has the {what} {names_text(sorted(names))} in it, {other} not{hint}"
        for one, names, other in sides
        if names
    ]

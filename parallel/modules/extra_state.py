"""The extra states of a module: what its parts save and load by torch's `get_extra_state` and `set_extra_state`."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from parallel.modules.units import plain_name

SUFFIX = "_extra_state"  # torch's, of the key in a state_dict


def extra_states(module: nn.Module) -> dict[str, Any]:
    """Return the extra state of each part of a module that has one, by the part's name."""
    return {name: part.get_extra_state() for name, part in _parts(module)}


def set_extra_states(module: nn.Module, states: Mapping[str, Any]) -> None:
    """Give each part its extra state, if it is among these."""
    for name, part in _parts(module):
        if name in states:
            part.set_extra_state(states[name])


def is_extra_state(key: str) -> bool:
    """Return True if a key of a state_dict is that of an extra state, which is no buffer."""
    return key.rpartition(".")[2] == SUFFIX


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            yield plain_name(name), part

"""The states of the random generators that a module's forward may draw from, to run it a second time."""

from typing import TypeAlias

import torch
from torch import Tensor

RandomStates: TypeAlias = list[Tensor]
"""The state of torch's generator on the host and, where the device has one, of that on the device."""


def random_states(device: torch.device) -> RandomStates:
    """Return the present states; the host does not wait for the device."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_random_states(states: RandomStates, device: torch.device) -> None:
    """Set the generators to these states."""
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)

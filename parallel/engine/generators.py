"""The states of the random generators that a sampler or a dataset may draw from, as values for JSON."""

import base64
import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch

States: TypeAlias = dict[str, Any]

NESTED = ("sampler", "batch_sampler")  # attributes in which a sampler has another one


class Generators:
    """The global generators of torch, numpy and Python, and those that are attributes of samplers."""

    def __init__(self, owners: Iterable[object]) -> None:
        self._global: dict[str, Any] = dict(torch=torch.default_generator, numpy=np.random, python=random)
        self._own: dict[str, Any] = {}
        waiting, seen = list(owners), set[int]()
        while waiting:
            owner = waiting.pop(0)
            if id(owner) not in seen and (attributes := getattr(owner, "__dict__", None)):
                seen.add(id(owner))
                waiting += [attributes[name] for name in NESTED if name in attributes]
                found = {f"{type(owner).__name__}.{name}": x for name, x in attributes.items() if _is_generator(x)}
                self._own |= {f"{len(seen)} {name}": x for name, x in found.items()}

    def states(self, *, own_only: bool = False) -> States:
        """Return the states of all generators by name; `own_only`: without the global ones."""
        found = self._own if own_only else self._global | self._own
        return {name: _state_of(generator) for name, generator in found.items()}

    def set_states(self, states: Mapping[str, Any], *, own_only: bool = False) -> None:
        """Set the generators to the states of these names."""
        for name, generator in (self._own if own_only else self._global | self._own).items():
            if name in states:
                _set_state(generator, states[name])

    @contextmanager
    def borrowed(self, states: Mapping[str, Any] | None) -> Iterator[None]:
        """Set the generators to these states for the time of the block; None: leave them as they are."""
        before = self.states() if states is not None else {}
        self.set_states(states or {})
        try:
            yield
        finally:
            self.set_states(before)


def _is_generator(x: object) -> bool:
    return isinstance(x, torch.Generator | np.random.Generator | np.random.RandomState | random.Random)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return base64.b64encode(generator.get_state().numpy().tobytes()).decode()
    if isinstance(generator, np.random.Generator):
        return _plain(generator.bit_generator.state)
    return _plain(generator.getstate() if hasattr(generator, "getstate") else generator.get_state())


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif hasattr(generator, "setstate"):
        version, internal, gauss = state
        generator.setstate((version, tuple(internal), gauss))
    else:
        generator.set_state(tuple(state))


def _plain(x: Any) -> Any:
    """Return x with lists in place of arrays and tuples, and Python's numbers in place of numpy's."""
    if isinstance(x, np.ndarray | np.generic):
        return x.tolist()
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    return [_plain(value) for value in x] if isinstance(x, list | tuple) else x

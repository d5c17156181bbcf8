"""The inputs of a module: tensors that are moved or cast, in containers that are the user's own."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    """Return the inputs with function(x) in place of each tensor x in tuples, lists, dicts and the like.

    A container in which no tensor becomes another one stays the same object: a module may append to a list that it was
    given.
    """
    if isinstance(inputs, Tensor):
        return function(inputs)
    parts, spec = tree_flatten(inputs, is_leaf=lambda part: part is not inputs)
    if len(parts) == 1 and parts[0] is inputs:
        return inputs
    mapped = [map_tensors(function, part) for part in parts]
    is_same = all(new is old for new, old in zip(mapped, parts, strict=True))
    return inputs if is_same else tree_unflatten(mapped, spec)

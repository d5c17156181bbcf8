"""Values of Python as JSON and tensors: what a checkpoint stores beside the tensors of a model, without pickle.

A value that JSON has is stored as it is. Any other one becomes an object with a single key that names its type:

    {5: 1} -> {"$dict": [[5, 1]]}        (0.9, 0.95) -> {"$tuple": [0.9, 0.95]}        torch.ones(2) -> {"$tensor": 0}

Decoding makes instances of the types that are listed here, and of nothing else: no code in a file is ever executed.
"""

import base64
import hashlib
import json
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from parallel import regular_file
from parallel.checkpoint.tensor_file import DTYPE_NAMES
from parallel.errors import CheckpointError, shortened

MARK = "$"
MOST_NESTED = regular_file.MOST_NESTED - 20
"""The most levels of JSON that a value may have: those of the index around it are fewer than 20."""

SEQUENCES: dict[str, Callable[[Iterable[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "bytearray": bytearray,
    "size": torch.Size,
}
MAPPINGS: dict[str, Callable[[Iterable[Any]], Any]] = {
    "dict": dict,
    "ordered_dict": OrderedDict,
    "counter": lambda pairs: Counter(dict(pairs)),
}
NAMES: dict[type, str] = {
    tuple: "tuple",
    set: "set",
    frozenset: "frozenset",
    bytearray: "bytearray",
    torch.Size: "size",
    dict: "dict",
    OrderedDict: "ordered_dict",
    Counter: "counter",
}
FACTORIES: dict[str, Any] = {cls.__name__: cls for cls in (dict, list, set, tuple, int, float, str)} | {"None": None}


@dataclass
class Encoded:
    """A value as JSON, and the tensors in it: `{"$tensor": i}` stands for `tensors[i]`."""

    json: Any = None
    tensors: list[Tensor] = field(default_factory=list)

    def digest(self) -> str:
        """Return a digest of the value, the same wherever the value is the same."""
        found = hashlib.sha256(json.dumps(self.json).encode())
        for x in self.tensors:
            found.update(x.reshape(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()


def encode(values: Mapping[str, Any]) -> Encoded:
    """Return values by name in their stored form; their tensors are copies on the host.

    Raises CheckpointError, with the path of what cannot be stored: `extra["scheduler"]["lr_lambdas"][0]`.
    """
    encoder = _Encoder()
    return Encoded({name: encoder.encode(value, name) for name, value in values.items()}, encoder.tensors)


class _Encoder:
    """Encodes one value: the tensors found so far, the containers that are open, of which none may be met again, and
    the levels of their JSON.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._open: list[Any] = []
        self._num_levels = 0

    def encode(self, x: Any, path: str) -> Any:
        """Return the JSON of a value at this path."""
        kind = type(x)
        if x is None or kind in (bool, str) or (kind is int and abs(x) < 2**1000):
            return x
        if kind is float:
            return x if math.isfinite(x) else {"$float": repr(x)}
        if kind in (int, complex):
            return {f"${kind.__name__}": hex(x) if kind is int else [repr(x.real), repr(x.imag)]}
        if kind in (Tensor, nn.Parameter):
            return {"$tensor": self._tensor(x.detach(), path)}
        if isinstance(x, np.ndarray | np.generic):
            return self._of_numpy(x, path)
        if kind is torch.dtype:
            return {"$dtype": name_of(x)}
        if kind is torch.device:
            return {"$device": str(x)}
        if kind is bytes:
            return {"$bytes": base64.b64encode(x).decode()}
        return self._within(x, path)

    def _within(self, x: Any, path: str) -> Any:
        """Return the JSON of a container, unless it contains itself or is nested too deep."""
        if any(x is other for other in self._open):
            raise CheckpointError(f"{path}: it contains itself, and cannot be stored.")
        self._open.append(x)
        self._num_levels += (num_levels := _levels_of(x))
        if self._num_levels > MOST_NESTED:
            raise CheckpointError(f"{shortened(path)}: it is nested too deep in other values to be stored.")
        found = self._container(x, path)
        self._num_levels -= num_levels
        self._open.pop()
        return found

    def _container(self, x: Any, path: str) -> Any:
        kind = type(x)
        name = NAMES.get(kind, "")
        if kind is list:
            return self._items(x, path)
        if _is_plain(x):
            return {key: self.encode(value, f"{path}[{json.dumps(key)}]") for key, value in x.items()}
        if name in MAPPINGS:
            return {f"${name}": self._pairs(x, path)}
        if name in SEQUENCES:
            items = self._items(x, path)
            is_unordered = kind in (set, frozenset)  # which would have another order in every process
            return {f"${name}": sorted(items, key=json.dumps) if is_unordered else items}
        if kind is deque:
            return {"$deque": [x.maxlen, self._items(x, path)]}
        factories = [name for name, make in FACTORIES.items() if kind is defaultdict and x.default_factory is make]
        if factories:
            return {"$defaultdict": [factories[0], self._pairs(x, path)]}
        raise CheckpointError(_refusal(x, path))

    def _items(self, items: Iterable[Any], path: str) -> list[Any]:
        return [self.encode(item, f"{path}[{i}]") for i, item in enumerate(items)]

    def _pairs(self, x: Mapping[Any, Any], path: str) -> list[list[Any]]:
        return [[self.encode(key, f"{path}: the key {key!r}"), self.encode(x[key], f"{path}[{key!r}]")] for key in x]

    def _tensor(self, x: Tensor, path: str) -> int:
        if x.is_meta or x.layout is not torch.strided or x.dtype not in DTYPE_NAMES:
            kind = "on the meta device" if x.is_meta else f"a tensor of {x.dtype} and {x.layout}"
            raise CheckpointError(f"{path}: it is {kind}, which safetensors cannot hold. Convert it first.")
        self.tensors.append(x.to("cpu", copy=True).contiguous())
        return len(self.tensors) - 1

    def _of_numpy(self, x: Any, path: str) -> Any:
        """Return the JSON of a number or an array of numpy: an array's bytes are a tensor."""
        is_plain = isinstance(x, np.generic) or type(x) in (np.ndarray, np.memmap)
        if not is_plain or x.dtype.kind in "OV" or not x.dtype.itemsize:
            raise CheckpointError(_refusal(x, path))
        if isinstance(x, np.generic):
            return {"$number": [x.dtype.str, base64.b64encode(x.tobytes()).decode()]}
        content = torch.frombuffer(bytearray(x.tobytes()), dtype=torch.uint8) if x.size else torch.empty(0).byte()
        return {"$array": [x.dtype.str, list(x.shape), self._tensor(content, path)]}


def _is_plain(x: Any) -> bool:
    """Return whether a value is a dict that JSON has."""
    return type(x) is dict and all(type(key) is str and not key.startswith(MARK) for key in x)


def _levels_of(x: Any) -> int:
    """Return the most levels of JSON by which what is in a container is deeper than the container."""
    if isinstance(x, Mapping):
        return 1 if _is_plain(x) else 4
    return 1 if type(x) is list else 3


def _refusal(x: Any, path: str) -> str:
    kind = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
    return (
        f"{path}: a value of type {kind} cannot be stored in a checkpoint, which holds no code. Store numbers, strings,"
        " tensors, arrays, and lists, tuples, sets and dicts of them."
    )


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype in torch."""
    return str(dtype).removeprefix("torch.")


def decode(found: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the value of this JSON. Raises CheckpointError where it is not what `encode` makes."""
    try:
        return _decode(found, tensors)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint is damaged: its values cannot be read ({error}).") from error


def _decode(found: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(found, list):
        return [_decode(item, tensors) for item in found]
    if not isinstance(found, dict):
        return found
    name, content = next(iter(found.items()), ("", None))
    if not name.startswith(MARK):
        return {key: _decode(value, tensors) for key, value in found.items()}
    kind = name.removeprefix(MARK)
    if kind in (SEQUENCES | MAPPINGS) and not isinstance(content, list):  # bytearray(n) would allocate n bytes
        raise TypeError(f"{name} without a list")
    if kind in SEQUENCES:
        return SEQUENCES[kind](_decode(content, tensors))
    if kind in MAPPINGS:
        return MAPPINGS[kind](_decode(content, tensors))
    return DECODERS[kind](content, tensors)


def _array(content: Any, tensors: Sequence[Tensor]) -> Any:
    dtype, shape, i = content
    return np.frombuffer(tensors[i].numpy().tobytes(), _plain_dtype(dtype)).reshape(shape).copy()


def _plain_dtype(name: str) -> "np.dtype[Any]":
    """Return the numpy dtype of this name. Raises ValueError for one whose values are objects or records."""
    found = np.dtype(name)
    if found.kind in "OV":
        raise ValueError(f"dtype {name}")
    return found


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of this name. Raises CheckpointError where torch has none."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"the checkpoint is damaged: it has a tensor of dtype {name}.")
    return found


DECODERS: dict[str, Callable[[Any, Sequence[Tensor]], Any]] = {
    "tensor": lambda i, tensors: tensors[i],
    "float": lambda text, _: float(text),
    "int": lambda text, _: int(text, 16),
    "complex": lambda parts, _: complex(*map(float, parts)),
    "bytes": lambda text, _: base64.b64decode(text),
    "dtype": lambda name, _: dtype_of(name),
    "device": lambda name, _: torch.device(name),
    "number": lambda pair, _: np.frombuffer(base64.b64decode(pair[1]), _plain_dtype(pair[0]))[0],
    "array": _array,
    "deque": lambda pair, tensors: deque(_decode(pair[1], tensors), maxlen=pair[0]),
    "defaultdict": lambda pair, tensors: defaultdict(FACTORIES[pair[0]], _decode(pair[1], tensors)),
}

"""The values of Python in a checkpoint come back as they were, or are refused by their path."""

import json
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from parallel.checkpoint.values import decode, encode
from parallel.errors import CheckpointError
from parallel.regular_file import parse_json

VALUES: dict[str, Any] = {
    "keys": {0: "a", "1": "b", None: "c", 2.5: "d", (1, 2): "e", True: "f"},
    "a key with a mark": {"$tensor": 0},
    "numbers": [0, -1, 2**200, 2**3000, 1.5, float("inf"), -float("inf"), 1j, True, None, "é\ud800", b"\x00\xff"],
    "containers": [
        (1, (2,)),
        {3, 1},
        frozenset([1]),
        [],
        {},
        (),
        Counter({2: 1}),
        OrderedDict(b=1, a=2),
        deque([1], 3),
    ],
    "a default": defaultdict(list, {1: [2]}),
    "numpy": [np.float32(0.1), np.int64(3), np.bool_(True), np.datetime64("2026-01-01"), np.str_("text")],
    "torch": [torch.Size([1, 2]), torch.bfloat16, torch.device("cpu")],
    "random": random.Random(3).getstate(),
}
TENSORS: list[torch.Tensor] = [
    torch.arange(6.0).view(2, 3).t(),
    torch.tensor(2.0, dtype=torch.bfloat16),
    torch.zeros(0, 3),
    torch.tensor([1, 2**16 - 1], dtype=torch.uint16),
    torch.tensor([1 + 2j]),
    torch.tensor([True]),
]
ARRAYS: list[Any] = [
    np.arange(6, dtype=np.uint16).reshape(2, 3),
    np.zeros((0, 2)),
    np.array(3.0),
    np.array(["ab", "c"]),
]


def test_values_come_back_equal_and_of_the_same_types() -> None:
    encoded = encode(VALUES)
    got = decode(json.loads(json.dumps(encoded.json)), encoded.tensors)
    assert got == VALUES
    assert repr(got) == repr(VALUES)  # which tells 1 from True and from numpy's 1
    encoded = encode(dict(tensors=TENSORS, arrays=ARRAYS, nan=[float("nan"), np.float64("nan")]))
    got = decode(json.loads(json.dumps(encoded.json)), encoded.tensors)
    for ours, theirs in zip(got["tensors"], TENSORS, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(ours, theirs)
    for x, y in zip(got["arrays"], ARRAYS, strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert (x == y).all()
        x[...] = y  # it can be written to
    assert all(x != x for x in got["nan"])


class Own:
    """A class of the user's."""


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (dict(scheduler=dict(lr_lambdas=[lambda step: 1.0])), 'extra["scheduler"]["lr_lambdas"][0]'),
        ({5: Own()}, "extra[5]"),
        ({"a": {Own(): 1}}, 'extra["a"]'),
        (dict(x=torch.ones(2).to_sparse()), 'extra["x"]'),
        (dict(x=torch.ones(2, device="meta")), 'extra["x"]'),
        (dict(x=np.array([Own()])), 'extra["x"]'),
        (dict(x=type("Text", (str,), {})("x")), 'extra["x"]'),
    ],
)
def test_what_cannot_be_stored_is_refused_by_its_path(value: Any, path: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        encode(dict(extra=value))
    assert str(refusal.value).startswith(path)


def test_a_value_that_contains_itself_is_refused() -> None:
    items: list[Any] = []
    items.append(items)
    with pytest.raises(CheckpointError, match=r"extra\[0\]: it contains itself"):
        encode(dict(extra=items))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: [x],
        lambda x: (x,),
        lambda x: {"a": x},
        lambda x: {"$": x},
        lambda x: {5: x},
        lambda x: deque([x]),
        lambda x: defaultdict(list, {1: x}),
        lambda x: frozenset([x]),
    ],
)
def test_a_value_is_saved_only_if_it_is_not_nested_too_deep_to_be_read(wrap: Callable[[Any], Any]) -> None:
    """One of 200 levels was saved, and then refused by whoever wanted to go on from it."""
    value: Any = 1j
    for _ in range(1000):
        value = wrap(value)
        try:
            found = encode(dict(extra=value))
        except CheckpointError as error:
            said = str(error)
            break
        index = dict(metadata=dict(values=[dict(json=found.json)]))
        last = decode(parse_json(json.dumps(index).encode(), "", CheckpointError)["metadata"]["values"][0]["json"], [])
    else:
        raise AssertionError
    assert said.startswith("extra")
    assert "nested too deep" in said
    assert wrap(last["extra"]) == value


@pytest.mark.parametrize("content", [{"$code": "x"}, {"$dtype": "load"}, {"$array": ["|O", [1], 0]}, {"$tensor": 9}])
def test_values_of_a_damaged_file_are_refused(content: Any) -> None:
    with pytest.raises(CheckpointError, match="is damaged"):
        decode({"x": content}, [torch.zeros(8, dtype=torch.uint8)])

"""Batches of any module: what the module's forward takes, and how a batch is cut into microbatches."""

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from parallel.errors import did_you_mean

LABELS, IDS = "labels", "input_ids"
COUNTED_BY_THE_CALLER = "num_items_in_batch"  # transformers' models divide by it in place of the number of labels


@dataclass(frozen=True)
class ForwardInputs:
    """The names of what a module's forward takes. `takes_all`: it also takes keyword arguments of any name."""

    names: tuple[str, ...]
    takes_all: bool

    @classmethod
    def of(cls, module: nn.Module) -> "ForwardInputs":
        """Read the signature of the module's forward.

        `**kwargs: Unpack[SomeTypedDict]`, as transformers' models have it, names what is taken. An adapter (peft's
        model, for example) passes its inputs on to a base model, which says what is taken.
        """
        module = getattr(module, "_orig_mod", module)  # of a compiled module
        base = getattr(module, "get_base_model", None)
        forward = (base() if callable(base) else module).forward
        try:
            parameters = inspect.signature(forward).parameters.values()
        except (TypeError, ValueError):  # it is not a function of Python
            return cls((), takes_all=True)
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        names = [one.name for one in parameters if one.kind in by_name]
        rest = [one.name for one in parameters if one.kind is inspect.Parameter.VAR_KEYWORD]
        named = _keys_of_a_typed_dict(forward, rest[0]) if rest else ()
        return cls(tuple(dict.fromkeys((*names, *(named or ())))), takes_all=named is None)

    def takes(self, name: str) -> bool:
        """Return whether the forward takes an argument of this name."""
        return self.takes_all or name in self.names

    def unknown(self, batch: Mapping[str, Any]) -> str:
        """Return a sentence about a key of the batch that the forward does not take; empty where it takes all."""
        for key in batch:
            if not self.takes(key):
                return f"The model's forward does not take {key!r}. {did_you_mean(key, self.names)}"
        return ""


def _keys_of_a_typed_dict(forward: Callable[..., Any], name: str) -> tuple[str, ...] | None:
    """Return the keys of a forward's keyword arguments where they are annotated as a typed dict, else None."""
    try:
        annotation = typing.get_type_hints(inspect.unwrap(forward)).get(name)
    except (NameError, TypeError, AttributeError, SyntaxError, ImportError):  # a name for type checkers only
        return None
    for kind in typing.get_args(annotation):
        if typing.is_typeddict(kind):
            return tuple(kind.__annotations__)
    return None


def num_samples(batch: Mapping[str, Any]) -> int:
    """Return the number of samples: the rows of the labels, of the token ids, or of the first tensor that has rows."""
    tensors = [batch.get(LABELS), batch.get(IDS), *tree_leaves(dict(batch))]
    return next((len(x) for x in tensors if isinstance(x, Tensor) and x.ndim), 0)


def batch_problem(batch: object, size: int) -> str:
    """Return what is wrong with the values of a batch that is cut into microbatches of `size` samples, or nothing."""
    if not isinstance(batch, Mapping):
        return f"batch: wanted a dict of tensors, got {type(batch).__name__}. Give the forward's inputs by name."
    if COUNTED_BY_THE_CALLER in batch:
        return f"batch: {COUNTED_BY_THE_CALLER!r} is counted here, over all microbatches and replicas. Leave it out."
    samples = num_samples(batch)
    if not samples:
        return f"batch: it has no samples, but {', '.join(map(str, batch)) or 'nothing'}."
    for key, value in batch.items():
        if not isinstance(value, bool | int | float | str | None) and (problem := _value_problem(value, samples, size)):
            return f"batch: {key!r} {problem}"
    return ""


def _value_problem(value: Any, samples: int, size: int) -> str:
    """Return the end of a sentence on what is wrong with a value of a batch, or nothing."""
    for x in tree_leaves(value):
        if not isinstance(x, Tensor | None):
            return f"holds {type(x).__name__}, which cannot be cut into microbatches. Make it a tensor."
        if x is not None and x.is_nested:
            return "is a nested tensor, which cannot be cut into microbatches. Pad it."
        if x is not None and x.ndim and len(x) != samples and samples > size:
            return (
                f"has {len(x)} rows, and the batch has {samples} samples: it cannot be cut into microbatches of"
                f" {size}. Try train.micro_batch_size={samples}, or a row for each sample."
            )
    return ""


def parts_of(batch: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """Yield the microbatches of a batch, `size` samples each and the rest last.

    Tensors are cut, also those in lists and dicts. Values without rows go into every microbatch.
    """
    samples = num_samples(batch)
    for start in range(0, samples, size):
        yield {key: tree_map(lambda x, a=start: _rows(x, a, size, samples), value) for key, value in batch.items()}


def _rows(x: Any, start: int, size: int, samples: int) -> Any:
    if not isinstance(x, Tensor):
        return x
    if x.is_inference():  # autograd records nothing that was made in torch's inference mode
        x = x.clone()
    return x[start : start + size] if x.ndim and samples > size else x


def num_given_labels(batch: Mapping[str, Any], ignored: int) -> int:
    """Return about how many labels a batch has: those that are not `ignored`, or one for each sample."""
    labels = batch.get(LABELS)
    if not isinstance(labels, Tensor):
        return num_samples(batch)
    return labels.numel() if labels.is_floating_point() else int(torch.count_nonzero(labels != ignored))

"""Sums over labels that may be empty because a mask or an ignored label leaves all of them out.

    losses = F.cross_entropy(output, labels, reduction="none")
    loss = (losses * mask).sum() / mask.sum().clamp(min=1)

Where the mask is empty, this divides zero by one, and not because there is one label. Of a sum that is divided by a
number of Python, len(losses) for example, no such thing is known.
"""

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

PASSED = {"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Clone", "ToCopy", "Neg", "Transpose", "T"}
PASSED |= {"Permute", "Expand", "Alias", "Sum", "Mean", "Mul", "Div", "MaskedFill", "Where", "Index", "IndexPut"}
"""Operations on losses that are masks, products, or change their shape alone."""


def name_of(node: Any) -> str:
    """Return the name of an operation without the suffix of its backward: MulBackward0 -> Mul."""
    name: str = node.name().removeprefix("torch::autograd::")
    return name.rstrip("0123456789").removesuffix("Backward")


def ignored_label(node: Any) -> int:
    """Return the label that a loss function ignores: the graph holds it as an unsigned number of 64 bits."""
    index: int = node._saved_ignore_index
    return index - 2**64 if index >= 2**63 else index


def is_number(x: Tensor) -> bool:
    """Return whether an operand in the graph was a number of Python: it then gives way to any other dtype."""
    other = torch.ones((), dtype=torch.float16 if x.is_floating_point() else torch.int8)
    is_widest = x.dtype in (torch.float64, torch.int64) and x.device.type == "cpu"
    return is_widest and x.ndim == 0 and torch.result_type(x, other) == other.dtype


def counts_of(total: Any, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return whether the sum that this operation computed is over any label, and what it may be over, fp64 [numbers].

    It goes back through masks, selections and a loss function. `size` is the number of elements that are added. The
    other numbers are, for each mask, the number of elements that it keeps, also broadcast to all, and the sum of its
    weights. Whether a label is left depends on the masks up to the first product: its factor is the mask, or the
    weights, that the divisor is the sum of. What is not known here may leave no label out.
    """
    found = torch.ones((), dtype=torch.bool, device=device)
    numbers, is_over = [torch.full((), size, dtype=torch.float64, device=device)], False
    for node, name in _way_back(total):
        kept = _kept(node, name)
        if kept is None:
            continue
        if not isinstance(kept, Tensor):
            found = found & kept
            continue
        found = found if is_over else found & kept.any()
        is_over |= name == "Mul"
        for weights in (kept, *_weights(node, name)):
            count = weights.sum(dtype=torch.float64).to(device, non_blocking=True)
            numbers += [count, count * (size / max(1, weights.numel()))]
    return found, torch.stack(numbers)


def _weights(node: Any, name: str) -> list[Tensor]:
    """Return by what an operation multiplies losses, or the weights of a loss function's labels."""
    if name == "Mul":
        sides = [getattr(node, side, None) for side in ("_saved_self", "_saved_other")]
        return [x.detach() for x in sides if isinstance(x, Tensor) and not x.requires_grad]
    if name in ("NllLoss", "NllLoss2D") and node._saved_weight is not None:
        target = node._saved_target
        counted = target != ignored_label(node)
        return [node._saved_weight.double()[target.masked_fill(~counted, 0)].masked_fill(~counted, 0)]
    return []


def is_scaled(total: Any, num_samples: int, *, by_weights: bool) -> bool:
    """Return whether the losses of this sum or mean were multiplied or divided before, maybe by their count.

    That is a product with a tensor of one number or, with `by_weights`, also with weights or with a number of Python. A
    mask of bools or integers leaves losses out, and weighs none.
    """
    for node, name in _way_back(total):
        if name not in ("Mul", "Div"):
            continue
        for x in (getattr(node, side, None) for side in ("_saved_self", "_saved_other")):
            is_tensor = isinstance(x, Tensor) and not is_number(x)
            if x is None or (is_tensor and x.requires_grad):
                continue
            is_one = is_tensor and (x.ndim == 0 or (x.numel() == 1 and num_samples > 1))
            is_mask = is_tensor and name == "Mul" and not x.is_floating_point()
            if is_one or (by_weights and not is_mask):
                return True
    return False


def _way_back(total: Any) -> Iterator[tuple[Any, str]]:
    """Yield this operation and those before it, with their names, up to the first that is no mask, shape or product."""
    node = total
    while node is not None:
        name = name_of(node)
        yield node, name
        operands = [operand for operand, _ in node.next_functions if operand is not None]
        node = operands[0] if name in PASSED and len(operands) == 1 else None


def _kept(node: Any, name: str) -> Tensor | bool | None:
    """Return which elements an operation keeps, or whether it keeps any; None where it keeps all."""
    match name:
        case "Sum":
            return bool(prod(node._saved_self_sym_sizes))
        case "Mul":
            sides = [getattr(node, side, None) for side in ("_saved_self", "_saved_other")]
            masks = [x for x in sides if isinstance(x, Tensor) and not x.requires_grad]
            return torch.ne(masks[0], 0) if len(masks) == 1 else None
        case "MaskedFill":
            return torch.logical_not(node._saved_mask)
        case "Where":
            chosen, other = (operand is not None for operand, _ in node.next_functions[-2:])
            return None if chosen and other else torch.ne(node._saved_condition, 0 if chosen else 1)
        case "IndexPut":
            (index, *others), is_kept = node._saved_indices, node.next_functions[0][0] is not None
            is_mask = not others and index is not None and index.dtype == torch.bool
            return torch.ne(index, is_kept) if is_mask else None
        case "NllLoss" | "NllLoss2D":
            return torch.ne(node._saved_target, ignored_label(node))
    return None

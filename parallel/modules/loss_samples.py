"""The part that single samples have in the graph of a loss: compared with each other, or reduced one by one."""

from collections import deque
from collections.abc import Iterator
from typing import Any

from parallel.modules.masked_sums import name_of

NODES = 32
"""The number of operations before a reduction that are looked at: a loss has few, and layers come before them."""

LEAF = "AccumulateGrad"


def compares_samples(reduction: Any, num_samples: int) -> bool:
    """Return whether a loss is computed from products of every sample with every other, as in a contrastive loss.

    That is a matrix [samples, samples] which is a product of two tensors that depend on the samples.
    """
    for node in _before(reduction):
        if name_of(node) == "Mm":
            sizes = [node._saved_self_sym_sizes[0], node._saved_mat2_sym_sizes[1]]
        elif name_of(node) == "Bmm":  # of an einsum
            one, other = node._saved_self.shape, node._saved_mat2.shape
            sizes = [one[1], other[2]] if one[0] == 1 else []
        else:
            continue
        operands = [operand for operand, _ in node.next_functions]
        if sizes == [num_samples, num_samples] and all(x is not None and not _is_weight(x) for x in operands):
            return True
    return False


def is_of_one_sample(reduction: Any, num_samples: int) -> bool:
    """Return whether this mean or sum is over a single sample, that was taken out of `num_samples`."""
    for node in _before(reduction):
        name = name_of(node)
        if name == "Unbind" and node._saved_dim == 0:
            return True
        if name in ("Select", "Split") and node._saved_dim == 0:
            return bool(node._saved_self_sym_sizes[0] == num_samples)
        if len([operand for operand, _ in node.next_functions if operand is not None]) > 1:
            return False
    return False


def _before(node: Any) -> Iterator[Any]:
    """Yield this operation and those before it, breadth first."""
    found, waiting = {node}, deque([node])
    while waiting and len(found) <= NODES:
        yield (node := waiting.popleft())
        new = {operand for operand, _ in node.next_functions if operand is not None} - found
        found |= new
        waiting.extend(new)


def _is_weight(node: Any) -> bool:
    """Return whether this is a parameter, perhaps transposed or cast."""
    while name_of(node) in ("T", "Transpose", "Permute", "ToCopy", "View"):
        node = node.next_functions[0][0]
    return name_of(node) == LEAF

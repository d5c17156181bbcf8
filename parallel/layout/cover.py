"""Boxes that cover a tensor: whether they do so exactly once."""

from collections.abc import Sequence
from math import prod

from parallel.layout.layout import box_shape
from parallel.layout.sources import Box


def covered_once(shape: tuple[int, ...], boxes: Sequence[Box]) -> bool:
    """Return whether each element of a tensor is in exactly one of the boxes, none of which is empty.

    That is so if the boxes lie in the tensor, have as many elements as it, and no two of them overlap.
    """
    for box in boxes:
        if not all(0 <= start < stop <= size for (start, stop), size in zip(box, shape, strict=True)):
            return False
    return sum(prod(box_shape(box)) for box in boxes) == prod(shape) and _are_disjoint(boxes)


def _are_disjoint(boxes: Sequence[Box]) -> bool:
    """Return whether no two boxes have an element in common.

    A line is swept along the first dim. Where boxes start, those that the line meets must be disjoint in the other
    dims. A few meet it at a time, where a layout has cut a tensor.
    """
    if len(boxes) < 2:
        return True
    if not boxes[0]:
        return False  # no dim is left in which they could differ
    starting: dict[int, list[Box]] = {}
    for box in boxes:
        starting.setdefault(box[0][0], []).append(box)
    met: list[Box] = []
    for line, new in sorted(starting.items()):
        met = [box for box in met if box[0][1] > line] + new
        if not _are_disjoint([box[1:] for box in met]):
            return False
    return True

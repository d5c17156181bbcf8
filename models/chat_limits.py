"""The limits of what a chat template may compute: a template is a file of others, and may have no end.

Importing this module imports jinja2.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST_ROUNDS = 500_000  # of loops in one text; it takes about a second
ROUNDS_OF_A_CALL = 10  # as many as take the time of calling a macro
MOST_CHARACTERS = 1 << 24  # of a text
MOST_ITEMS = 1 << 18  # of a list
MOST_BITS = 1 << 16  # of a number
WIDE = re.compile(r"\d{7,}|\*")  # a width in a format
SIZED = (str, bytes, list, tuple)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which loops and calls are counted, and values are refused before they are large.

    `begin` sets the count to zero: each text has its own.
    """

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._rounds = 0
        self.filters |= {"_counted": self._counted, "_joined": _joined, "_checked": _checked}
        self.globals.pop("lipsum")  # it writes texts of any length
        for name in ("sum", "center", "indent", "replace", "join", "format", "batch", "slice", "wordwrap", "truncate"):
            self.filters[name] = _limited(self.filters[name])

    def begin(self) -> None:
        """Begin another text."""
        self._rounds = 0

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Limits().visit(super()._parse(source, name, filename))
        return tree

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function of the template, or a method of a value."""
        self._count(ROUNDS_OF_A_CALL)
        _check_arguments(function, args, kwargs)
        return _checked(super().call(context, function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        """Return what calls str.format, unless it would write a text that is wide."""
        found = super().wrap_str_format(value)
        if found is not None and WIDE.search(value.__self__):
            raise _too_large()
        return found

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Return what an operator gives."""
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def _count(self, rounds: int) -> None:
        self._rounds += rounds
        if self._rounds > MOST_ROUNDS:
            raise SecurityError(f"it takes more than {MOST_ROUNDS} rounds of loops and calls for one text")

    def _counted(self, items: Iterable[Any]) -> Iterable[Any]:
        """Count the rounds of a loop over these items: at once where they are few, and else one by one."""
        if isinstance(items, (*SIZED, dict)):
            self._count(len(items) + 1)
            return items
        return self._counted_one_by_one(items)

    def _counted_one_by_one(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self._count(1)
            yield item


class _Limits(NodeTransformer):
    """Puts the filters that count and check into a template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja2 calls it so
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_counted", node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_joined", node)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.filter = _filter(node.filter, "_checked", node)
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.node = _filter(node.node, "_checked", node)
        return node


def _filter(value: Any, name: str, at: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=at.lineno)


def _limited(function: Any) -> Any:
    """Return a filter of jinja2 whose arguments are checked before it is called, and its result afterwards."""

    def call(*args: Any, **kwargs: Any) -> Any:
        values = [value for value in args if isinstance(value, (*SIZED, int))]
        _check_arguments(function, values, kwargs)
        return _checked(function(*args, **kwargs))

    for mark in ("jinja_pass_arg",):
        if hasattr(function, mark):
            setattr(call, mark, getattr(function, mark))
    return call


def _checked(value: Any) -> Any:
    if isinstance(value, SIZED) and len(value) > _most(value):
        raise _too_large()
    return value


def _most(value: Any) -> int:
    """Return the most items that a value of this kind may have."""
    return MOST_CHARACTERS if isinstance(value, (str, bytes)) else MOST_ITEMS


def _joined(parts: Iterable[Any]) -> str:
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) > MOST_CHARACTERS:
        raise _too_large()
    return "".join(texts)


def _check_arguments(function: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> None:
    """Raise SecurityError for a call whose result may be large, as where a text is padded."""
    own = getattr(function, "__self__", None)
    values = [*([own] if isinstance(own, SIZED) else []), *args, *kwargs.values()]
    numbers = [value for value in values if isinstance(value, int)]
    if max(map(abs, numbers), default=0) > MOST_CHARACTERS and not isinstance(own, (list, tuple, dict)):
        raise _too_large()
    name = getattr(function, "__name__", "").removeprefix("do_").removeprefix("sync_do_")
    texts = [value for value in values if isinstance(value, (str, list, tuple))]
    sizes = [len(text) for text in texts]
    is_large = {
        "replace": len(texts) > 2 and str(texts[0]).count(str(texts[1])) * sizes[2] > MOST_CHARACTERS,
        "join": len(texts) > 1 and sizes[0] * sizes[1] > MOST_CHARACTERS,
        "wordwrap": sum(sizes) > MOST_CHARACTERS // 1000,
        "translate": True,
        "format": bool(texts) and WIDE.search(str(texts[0])) is not None,
        "format_map": True,
    }
    if is_large.get(name, False):
        raise _too_large()


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Raise SecurityError for an operation whose result would be large."""
    if operator == "%":
        is_large = isinstance(left, str) and WIDE.search(left) is not None
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        is_large = bits > MOST_BITS
    elif operator == "*":
        number, repeated = (left, right) if isinstance(left, int) else (right, left)
        is_large = isinstance(number, int) and isinstance(repeated, SIZED) and number * len(repeated) > _most(repeated)
    else:
        is_large = isinstance(left, SIZED) and isinstance(right, SIZED) and len(left) + len(right) > _most(left)
    if is_large:
        raise _too_large()


def _too_large() -> SecurityError:
    return SecurityError("it makes a text, a list or a number that is too large")

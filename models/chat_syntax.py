"""The Jinja in which chat templates are written: the environment that transformers gives them.

Importing this module imports jinja2.
"""

import json
from datetime import datetime
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.utils import Namespace

from models.chat_limits import LimitedEnvironment


class Answer(str):
    """The text of a block {% generation %}, which a template's output keeps apart from the text around it."""

    __slots__ = ()


class GenerationBlock(Extension):
    """The tags {% generation %} … {% endgeneration %} around what the model is to say."""

    tags = {"generation"}  # noqa: RUF012 - the class of jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_answer"), [], [], body).set_lineno(line)

    def _answer(self, caller: Macro) -> Answer:
        return Answer(caller())


class PlainNamespace(Namespace):
    """A namespace of a template, without names by which it could reach Python's own objects."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # without `self`, so that a template may have that name
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class PlainDict:
    """The function `dict` of a template, which has no attributes of Python's class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def compile_template(source: str) -> tuple[Template, bool]:
    """Return a chat template, and whether it has blocks {% generation %}.

    Raises TemplateError where it is no Jinja, or where what a block {% generation %} says cannot be found in the
    output, since it is inside a macro or another block that is written later.
    """
    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": PlainDict(),
        "namespace": PlainNamespace,
    }
    tree = environment.parse(source)
    for outer in tree.find_all((nodes.Macro, nodes.AssignBlock, nodes.FilterBlock)):
        if outer.find(nodes.ExtensionAttribute):
            raise TemplateError(f"line {outer.lineno} has a generation block inside a macro, a set or a filter")
    return environment.from_string(source), tree.find(nodes.ExtensionAttribute) is not None


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the name {name!r}, which begins with an underscore")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON. Jinja's own filter would write <, > and & as HTML has them."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

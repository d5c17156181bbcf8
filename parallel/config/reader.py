"""Reads raw values into frozen dataclasses by their type hints: what a hint can express needs no code in a section.

A hint is bool, int, float, str, Bytes, a Literal, a tuple, a dataclass or a union of such; Annotated adds Range,
Expanded, NamesOrFile and Rest.
"""

import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from difflib import SequenceMatcher
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from parallel.config.literals import literal
from parallel.config.other_names import OTHER_DTYPES, advice, key_text
from parallel.config.paths import PathError, expanded
from parallel.errors import SHOWN, ConfigError, closest, shown

Section = TypeVar("Section")


class Bytes(int):
    """A number of bytes, which a config may write as '6GiB' (powers of 1024) or '6GB' (powers of 1000)."""


MAX_BYTES = 2**60
NO_MODEL_REACHES = 1024
MAX_DEPTH = 20  # of a config's dicts, lists and tuples in one another
MAX_PATH, MAX_FILE_NAME = 4095, 255  # bytes; Linux's limits


@dataclass(frozen=True)
class Range:
    """The values with low <= value <= high, or with low <= value < high if `open`."""

    low: float
    high: float = math.inf
    open: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value and (value < self.high if self.open else value <= self.high)

    def needs(self, value: float) -> str:
        """Return what a value outside the range needs; an upper limit that no model reaches is only named to those."""
        if self.high >= NO_MODEL_REACHES:
            return f"at most {self.high}" if value > self.high else f"at least {self.low}"
        return f"{self.low} <= value {'<' if self.open else '<='} {self.high}"


Count = Annotated[int, Range(1, 2**40)]
"""A whole number from 1 to 2⁴⁰, so that the search for a value that would work ends in less than a second."""

Natural = Annotated[int, Range(0, 2**40)]
"""A whole number from 0 to 2⁴⁰."""

NumRanks = Annotated[int, Range(1, 2**20)]
"""A number of ranks along an axis: at most a million."""

Probability = Annotated[float, Range(0, 1, open=True)]
"""A number from 0 to 1, but not 1."""


class Expanded:
    """The mark of a path, in which `~` and variables are replaced."""


@dataclass(frozen=True)
class NamesOrFile:
    """The mark of a text that is one of these names, or the path of a file that ends in `suffix`, in capitals or not.

    `other_names`: what other programs call them, in lower case without punctuation. `read_file` returns what becomes of
    a path; it may raise ConfigError.
    """

    names: tuple[str, ...]
    suffix: str
    other_names: Mapping[str, str]
    read_file: Callable[[str], str] = str

    def read(self, raw: object) -> str:
        """Return a name as it is, and a path expanded. Raises MisreadError."""
        if isinstance(raw, os.PathLike):
            raw = os.fspath(raw)
        if isinstance(raw, str) and raw in self.names:
            return raw
        if isinstance(raw, str) and raw.casefold().endswith(self.suffix):
            return self.read_file(_expanded(_scalar(str, raw)))
        wrong = f"needs one of {', '.join(map(repr, self.names))}, or a {self.suffix} file, got {shown(raw)}"
        plain = re.sub(r"\W|_", "", raw[:SHOWN]).casefold().removeprefix("schedule") if isinstance(raw, str) else ""
        nearest = self.other_names.get(plain) or closest(plain, self.names)
        raise MisreadError(wrong, nearest or MISSING)


class Rest:
    """The mark of a field that holds all keys of a section for which it has no field."""


PathText = Annotated[str, Expanded()]
"""A path, of which `~` and `$NAME` may be a part."""


class MisreadError(Exception):
    """A value that its hint does not allow: what is wrong, and the nearest allowed value, if there is one."""

    def __init__(self, wrong: str, nearest: object = MISSING) -> None:
        self.wrong, self.nearest = wrong, nearest


@dataclass
class Reader:
    """Reads sections and collects problems; where a value cannot be read, the field keeps its default."""

    problems: list[str] = field(default_factory=list)
    misread: set[str] = field(default_factory=set)
    """The top-level sections in which something could not be read."""
    sections: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The keys of every top-level section, to recognize one in the wrong section."""

    def could_read(self, *sections: str) -> bool:
        """Return whether every key of these top-level sections could be read."""
        return self.misread.isdisjoint(sections)

    def section(self, kind: type[Section], raw: object, path: tuple[str, ...] = ()) -> Section:
        """Read a dict into the dataclass `kind`; `path` holds the keys that lead to the dict in the config."""
        if not isinstance(raw, Mapping):
            self._report(path, f"needs a dict, got {shown(raw)}. Try dict().")
            return kind()
        hints, rest = hints_of(kind)
        defaults = {key.name: key.default for key in fields(kind)}  # type: ignore[arg-type]
        values: dict[str, Any] = {} if rest is None else {rest: {}}
        for key, value in raw.items():
            here = (*path, key_text(key))
            inner = _section_of(hints.get(key))
            if key not in hints and rest is not None:
                values[rest][key] = value
            elif key not in hints:
                self._report_unknown(here, list(hints))
            elif inner is not None and not (value is None and inner is not hints[key]):
                values[key] = self.section(inner, value, here)
            else:
                values[key] = self._value(hints[key], value, here, defaults[key])
        return kind(**values)

    def _value(self, hint: Any, raw: object, path: tuple[str, ...], default: object) -> Any:
        try:
            return convert(hint, raw)
        except ConfigError as error:
            self.problems += error.problems
            self.misread.update(path[:1])
            return default
        except MisreadError as error:
            nearest = error.nearest if can_convert(hint, error.nearest) else default
            self._report(path, f"{error.wrong}. Try {nearest!r}.")
            return default

    def _report(self, path: tuple[str, ...], wrong: str) -> None:
        self.problems.append(f"{'.'.join(path) or 'config'}: {wrong}")
        self.misread.update(path[:1])

    def _report_unknown(self, path: tuple[str, ...], known: list[str]) -> None:
        self._report(path, advice(path, known, self.sections))
        if len(path) == 1:  # its values were meant for the section with a similar name, which is therefore not complete
            self.misread.add(closest(path[-1], known) or path[-1])


def hints_of(kind: type) -> tuple[dict[str, Any], str | None]:
    """Return the hint of each field of a dataclass, and the name of the field for the keys that have none."""
    hints = get_type_hints(kind, include_extras=True)
    found = {key.name: hints[key.name] for key in fields(kind)}
    rest = next((name for name, hint in found.items() if any(annotations_of(hint, Rest))), None)
    return {name: hint for name, hint in found.items() if name != rest}, rest


def _section_of(hint: Any) -> Any:
    """Return the dataclass of a hint that is one, or one or None; else None."""
    if get_origin(hint) in (Union, UnionType):
        hint = next((argument for argument in get_args(hint) if is_dataclass(argument)), None)
    return hint if is_dataclass(hint) else None


def annotations_of(hint: Any, kind: type[Section]) -> Iterator[Section]:
    """Yield the objects of one kind, such as Range, that an `Annotated` hint carries."""
    if get_origin(hint) is Annotated:
        yield from (annotation for annotation in hint.__metadata__ if isinstance(annotation, kind))


def convert(hint: Any, raw: object) -> Any:
    """Return `raw` as its hint requires: lists become tuples, ints floats, '6GiB' bytes. Raises MisreadError."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        for names in annotations_of(hint, NamesOrFile):
            return names.read(raw)
        value = convert(arguments[0], raw)
        for bounds in annotations_of(hint, Range):
            if value is not None and value not in bounds:
                nearest = bounds.low if value < bounds.low else MISSING if bounds.open else bounds.high
                raise MisreadError(f"needs {bounds.needs(value)}, got {shown(raw)}", nearest)
        return _expanded(value) if any(annotations_of(hint, Expanded)) else value
    if origin in (Union, UnionType):
        return _one_of(arguments, raw)
    if origin is Literal:
        return _choice(arguments, raw)
    if origin is tuple:
        return _tuple(arguments, raw)
    return _bytes(raw) if hint is Bytes else _scalar(hint, raw)


def can_convert(hint: Any, raw: object) -> bool:
    """Return whether the hint allows this value."""
    try:
        convert(hint, raw)
    except MisreadError:
        return False
    return True


def _one_of(hints: tuple[Any, ...], raw: object) -> Any:
    """Return `raw` as one of these hints requires: None as None, a list as a tuple, if they are among them."""
    if raw is None and NoneType in hints:
        return None
    is_list = isinstance(raw, (list, tuple))
    kinds = [hint for hint in hints if hint is not NoneType]
    fitting = [kind for kind in kinds if is_list is (get_origin(kind) is tuple)]
    return _optional((fitting or kinds)[0], raw)


def _optional(hint: Any, raw: object) -> Any:
    """Return `raw` as the hint requires. Raises MisreadError with the most similar choice, if the hint lists choices.

    Without it the default would be advised: None, which the message does not list.
    """
    try:
        return convert(hint, raw)
    except MisreadError as error:
        if get_origin(hint) is not Literal or error.nearest is not MISSING:
            raise
        similar = max(get_args(hint), key=lambda choice: SequenceMatcher(None, str(choice), shown(raw)).ratio())
        raise MisreadError(error.wrong, similar) from error


def _choice(choices: tuple[object, ...], raw: object) -> object:
    """Return `raw` if it is one of the choices; else raise MisreadError with the most similar one."""
    if any(type(raw) is type(choice) and raw == choice for choice in choices):
        return raw
    match = _similar(raw, list(map(str, choices))) if isinstance(raw, str) else None
    numbers = [choice for choice in choices if isinstance(choice, int) and not isinstance(choice, bool)]
    if isinstance(raw, int) and not isinstance(raw, bool) and numbers:
        nearest: object = min(numbers, key=lambda choice: abs(choice - raw))
        raise MisreadError(f"needs one of {', '.join(map(repr, choices))}, got {shown(raw)}", nearest)
    if match is None:
        raise MisreadError(f"needs one of {', '.join(map(repr, choices))}, got {shown(raw)}")
    nearest = next(choice for choice in choices if str(choice) == match)
    raise MisreadError(f"needs one of {', '.join(map(repr, choices))}, got {shown(raw)}", nearest)


def _similar(word: str, choices: list[str]) -> str | None:
    """Return the choice that means what this dtype of another library does, or else the most similar one, if any."""
    names = OTHER_DTYPES.get(word.casefold().removeprefix("torch."), ())
    return next((name for name in names if name in choices), None) or closest(word, choices)


def _tuple(arguments: tuple[Any, ...], raw: object) -> tuple[Any, ...]:
    if not isinstance(raw, (list, tuple)):
        raise MisreadError(f"needs a tuple, got {shown(raw)}", (raw,))
    hints = (arguments[0],) * len(raw) if arguments[-1] is Ellipsis else arguments
    if len(hints) != len(raw):
        raise MisreadError(f"needs {len(hints)} values, got {shown(raw)}")
    values: list[object] = []
    for hint, item in zip(hints, raw, strict=True):
        try:
            values.append(convert(hint, item))
        except MisreadError as error:
            cured = (*values, error.nearest, *raw[len(values) + 1 :])
            is_cure = error.nearest is not MISSING and all(map(can_convert, hints, cured))
            raise MisreadError(f"{error.wrong} in {shown(raw)}", cured if is_cure else MISSING) from error
    return tuple(values)


def _scalar(kind: type, raw: object) -> Any:
    if kind is str and isinstance(raw, os.PathLike):
        return os.fspath(raw)
    if isinstance(raw, bool) is not (kind is bool):  # in Python True is an int; in a config it is not meant as one
        raise MisreadError(f"needs {_article(kind)}, got {shown(raw)}")
    if kind is float and isinstance(raw, (int, float)):
        if abs(raw) <= sys.float_info.max:
            return float(raw)
        raise MisreadError(f"needs a finite number, got {shown(raw)}")
    if not isinstance(raw, kind):
        raise MisreadError(f"needs {_article(kind)}, got {shown(raw)}", _nearest(kind, raw))
    if isinstance(raw, str) and (problem := _text_problem(raw)):
        raise MisreadError(f"{problem}, got {shown(raw)}")
    return raw


def _text_problem(text: str) -> str:
    """Return why a text can be neither a name nor a path, or an empty string if it can."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        return "needs characters that UTF-8 can write"
    if b"\0" in encoded:
        return "needs text without the character NUL"
    if len(encoded) > MAX_PATH or any(len(name) > MAX_FILE_NAME for name in encoded.split(b"/")):
        return f"needs at most {MAX_FILE_NAME} bytes between two slashes, and {MAX_PATH} bytes in all"
    return ""


def _expanded(value: str) -> str:
    try:
        return expanded(value)
    except PathError as error:
        raise MisreadError(str(error)) from error


def _article(kind: type) -> str:
    return f"an {kind.__name__}" if kind is int else f"a {kind.__name__}"


def _nearest(kind: type, raw: object) -> object:
    """Return what `raw` was probably meant to be: 20 for '20' and for 20.0, '20' for 20."""
    if kind is str and isinstance(raw, int | float):
        return shown(raw)
    value = literal(raw) if isinstance(raw, str) else raw
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is kind else MISSING


def _bytes(raw: object) -> Bytes:
    if isinstance(raw, int) and not isinstance(raw, bool) and 0 <= raw <= MAX_BYTES:
        return Bytes(raw)
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(i?)B", raw.strip()) if isinstance(raw, str) else None
    if match is None:
        raise MisreadError(f"needs a number of bytes, got {shown(raw)}", "6GiB")
    number, prefix, binary = match.groups()
    count = float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " ")
    if count > MAX_BYTES:
        raise MisreadError(f"needs at most {MAX_BYTES} bytes, got {shown(raw)}", "6GiB")
    return Bytes(count)

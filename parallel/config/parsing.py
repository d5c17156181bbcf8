"""The entry point for configs: a file or a dict, with overrides, becomes one frozen `Config` or one `ConfigError`."""

import os
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, get_type_hints

from parallel.config.literals import literal
from parallel.config.other_names import accumulation_problems
from parallel.config.parallel import ParallelConfig
from parallel.config.reader import MAX_DEPTH, Reader, hints_of
from parallel.config.sections import Config
from parallel.errors import ConfigError, closest, either, shortened, shown
from parallel.regular_file import is_missing, parse_json, read_input, with_key

MOST_BYTES = 1 << 20  # of a config file
MOST_ADVISED = 64  # the largest size that is tried for a tensor mode without one
SUFFIXES = (".py", ".json", "")  # of config files; none: a pipe, such as /dev/stdin

KEYS = {section.name: tuple(hints_of(get_type_hints(Config)[section.name])[0]) for section in fields(Config)}
"""The keys of every section; those of `model` that its family has are not among them."""

Resolver: TypeAlias = Callable[[Config], tuple[Config, list[str]]]
"""Takes a config; returns it with the fields that depend on the model filled in, and what does not fit the model."""


def load_raw(path: str | Path) -> dict[str, Any]:
    """Return the names that a config file assigns, or the content of a run's config.json.

    Modules, functions and names that begin with an underscore are left out. `parse` refuses those that are no sections.
    Raises ConfigError, with the file and the line of the error.
    """
    file, name = Path(os.path.expanduser(path)), shortened(str(path))
    if file.suffix not in SUFFIXES:
        raise ConfigError(
            f"{name}: a config is a Python file of dicts, or the config.json of a run. In a file that ends in .py write"
            " train = dict(steps=20), parallel = dict(pipeline=2), and so on."
        )
    if is_missing(file):
        match = closest(file.name, _files_beside(file))
        hint = f" Did you mean {str(file.with_name(match))!r}?" if match else ""
        raise ConfigError(f"{name}: cannot read the config: it does not exist.{hint}")
    content = read_input(file, with_key(ConfigError, "config"), at_most=MOST_BYTES)
    return _from_json(file, content) if file.suffix == ".json" else _from_python(file, content)


def _files_beside(file: Path) -> list[str]:
    """Return the names of the files beside this one that end as it does; none where the folder cannot be read."""
    try:
        return [other.name for other in file.parent.iterdir() if other.suffix == file.suffix and other.is_file()]
    except (OSError, ValueError):
        return []


def _from_json(file: Path, content: bytes) -> dict[str, Any]:
    raw = parse_json(content, str(file), ConfigError)
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: not a config: it holds no sections.")
    return raw


def _from_python(file: Path, content: bytes) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": file.stem, "__file__": str(file)}
    try:
        exec(compile(content, str(file), "exec"), namespace)
    except SyntaxError as error:
        raise ConfigError(f"{file}:{error.lineno or 1}: {error.msg}.") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(_raised(file, error)) from error
    return {
        name: value
        for name, value in namespace.items()
        if not (name.startswith("_") or isinstance(value, ModuleType) or callable(value))
    }


def _raised(file: Path, error: BaseException) -> str:
    """Return the message for an exception that the config file raised, with the last line in that file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{file}:{lines[-1] if lines else 1}: {type(error).__name__}: {shortened(str(error))}."


def apply_overrides(raw: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `raw` in which each 'dotted.key=value' is set in turn; a dict as value replaces a whole section.

    Raises ConfigError for assignments that are not of this form.
    """
    config = normalize(raw)
    problems = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        *sections, name = key.strip().split(".")
        place: Any = config
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else None
        if not (equals and name and all(sections)):
            problems.append(f"--set {shortened(assignment)}: not of the form key=value. Try train.steps=20.")
        elif not isinstance(place, dict):
            problems.append(
                f"--set {shortened(assignment)}: {shortened('.'.join(sections))} has no keys. Try train.steps=20."
            )
        else:
            place[name] = literal(text)
            config = normalize(config)
    if problems:
        raise ConfigError(*problems)
    return config


def normalize(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the nested dicts with short spellings written out.

    pipeline=2 becomes pipeline=dict(size=2), and tensor="1d" becomes tensor=dict(mode="1d"). Raises ConfigError for
    dicts that are nested too deep.
    """
    config: dict[str, Any] = _copy(raw)
    parallel = config.get("parallel")
    if isinstance(parallel, dict):
        for key, short in (("pipeline", "size"), ("context", "size"), ("tensor", "mode")):
            if key in parallel and not isinstance(parallel[key], dict):
                parallel[key] = {short: parallel[key]}
    return config


def _replace_sequence_mode(config: dict[str, Any]) -> list[str]:
    """Replace a tensor mode 'sequence' (Colossal-AI's name) by a ring of that size, in place; return what is wrong."""
    parallel = config.get("parallel")
    tensor = parallel.get("tensor") if isinstance(parallel, dict) else None
    if not isinstance(tensor, dict) or tensor.get("mode") != "sequence":
        return []
    size = tensor.pop("size", 1)
    del tensor["mode"]
    if "context" in config["parallel"]:
        return [f"parallel.tensor: mode 'sequence' is a ring, as parallel.context is. Try context={shown(size)} alone."]
    config["parallel"]["context"] = {"size": size}
    return []


def _length_problems(config: dict[str, Any]) -> list[str]:
    """Take `train.steps` out of a raw config that has `train.epochs`; return what is wrong if it has both.

    A value of None is that of a key which is left out: so `--set` can replace one by the other.
    """
    train = config.get("train")
    if not isinstance(train, dict) or train.get("epochs") is None:
        return []
    steps = train.pop("steps", None)
    if steps is None:
        return []
    return [
        f"train.epochs: {shown(train['epochs'])} and train.steps {shown(steps)} are two lengths of one run. Try"
        " train.steps=None or train.epochs=None."
    ]


def _needs_size(config: dict[str, Any]) -> bool:
    """Return whether a tensor mode is given without its size."""
    parallel = config.get("parallel")
    tensor = parallel.get("tensor") if isinstance(parallel, dict) else None
    return isinstance(tensor, dict) and tensor.get("mode") is not None and "size" not in tensor


def _missing_size(config: Config, world_size: int | None, resolve: Resolver | None) -> str:
    """Return the message about a tensor mode without a size: the smallest sizes that fit the mode, world and model."""
    mode, sizes = config.parallel.tensor.mode, _fitting_sizes(config, resolve)
    here = [size for size in sizes if world_size is None or not _with_size(config, size).world_problems(world_size)]
    processes = "" if here else ", with a multiple of that many processes"
    tries = f"Try size={either((here or sizes)[:3])}{processes}." if sizes else "No size up to 64 fits this model."
    return f"parallel.tensor: mode {mode!r} needs a size, the number of ranks that share each layer. {tries}"


def _fitting_sizes(config: Config, resolve: Resolver | None) -> list[int]:
    """Return the sizes, in order, that the tensor mode can have and that divide the model."""
    layouts = {size: _with_size(config, size) for size in range(2, MOST_ADVISED + 1)}
    possible = [size for size, layout in layouts.items() if not layout.problems()]
    return [s for s in possible if resolve is None or not resolve(replace(config, parallel=layouts[s]))[1]]


def _with_size(config: Config, size: int) -> ParallelConfig:
    return replace(config.parallel, tensor=replace(config.parallel.tensor, size=size))


def _copy(value: Any, depth: int = 0) -> Any:
    if not isinstance(value, Mapping):
        return value
    if depth == MAX_DEPTH:
        raise ConfigError(f"config: its dicts are nested more than {MAX_DEPTH} deep.")
    return {key: _copy(item, depth + 1) for key, item in value.items()}


def parse(
    raw: Mapping[str, Any], *, world_size: int | None = None, resolve: Resolver | None = None, batches: bool = True
) -> Config:
    """Return the config that `raw` describes; raise one ConfigError with all of its problems.

    Without a world size, what depends on one is not checked; without a resolver, what depends on the model is not.
    `batches`: whether the global batch size is used, and must therefore divide into microbatches and replicas.
    """
    written_out = normalize(raw)
    reader = Reader(sections=KEYS)
    problems = _replace_sequence_mode(written_out) + accumulation_problems(written_out) + _length_problems(written_out)
    needs_size = _needs_size(written_out)
    config = reader.section(Config, written_out)
    problems += reader.problems
    if needs_size and reader.could_read("parallel"):
        problems.append(_missing_size(config, world_size, resolve if reader.could_read("model", "data") else None))
    layout_problems = config.parallel.problems() if reader.could_read("parallel") else []
    problems += layout_problems
    is_layout_valid = reader.could_read("parallel") and not layout_problems
    if is_layout_valid and world_size is not None:
        world_problems = config.parallel.world_problems(world_size)
        problems += world_problems
        world_size = None if world_problems else world_size
    if is_layout_valid and reader.could_read("train"):
        problems += config.microbatch_problems()
        problems += config.batch_problems(world_size) if batches else []
    if is_layout_valid and reader.could_read("train"):
        problems += config.precision_problems()
    if is_layout_valid and reader.could_read("data"):
        problems += config.document_problems()
    if reader.could_read("zero"):
        problems += config.zero.problems()
    if reader.could_read("train", "data", "output"):
        problems += config.evaluation_problems()
    if resolve is not None and reader.could_read("model", "data"):
        # The model is checked even if the layout is wrong: as if it were not split at all.
        config, model_problems = resolve(config if is_layout_valid else replace(config, parallel=ParallelConfig()))
        problems += model_problems
    if problems:
        raise ConfigError(*problems)
    return config

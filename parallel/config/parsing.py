"""The door for configs: a file or a dict, and overrides, become one frozen `Config` or one `ConfigError`."""

import json
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from parallel.config.parallel import ParallelConfig
from parallel.config.reader import Reader, literal
from parallel.config.sections import (
    Config,
)
from parallel.errors import ConfigError, closest

Resolver: TypeAlias = Callable[[Config], tuple[Config, list[str]]]
"""Fills in what only a model knows, and says what does not fit it."""


def load_raw(path: str | Path) -> dict[str, Any]:
    """The names that a config file assigns, modules, functions and underscored ones left out; or a run's config.json.

    `parse` says which of them are no sections. Raises ConfigError with the file and line of what goes wrong.
    """
    file = Path(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        match = closest(file.name, (other.name for other in file.parent.glob(f"*{file.suffix}")))
        hint = f" Did you mean {str(file.with_name(match))!r}?" if match else ""
        raise ConfigError(f"{file}: cannot read the config: {error.strerror}.{hint}") from error
    return _from_json(file, content) if file.suffix == ".json" else _from_python(file, content)


def _from_json(file: Path, content: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(content)
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file}: not a config: it holds no sections.")
    return raw


def _from_python(file: Path, content: bytes) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": file.stem, "__file__": str(file)}
    try:
        exec(compile(content, str(file), "exec"), namespace)
    except SyntaxError as error:
        raise ConfigError(f"{file}:{error.lineno}: {error.msg}.") from error
    except Exception as error:
        raise ConfigError(_raised(file, error)) from error
    return {
        name: value
        for name, value in namespace.items()
        if not (name.startswith("_") or isinstance(value, ModuleType) or callable(value))
    }


def _raised(file: Path, error: Exception) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{file}:{lines[-1] if lines else 1}: {type(error).__name__}: {error}."


def apply_overrides(raw: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """`raw` with each 'dotted.key=value' set in turn, in a new dict; a dict as value replaces the whole sub-dict."""
    config = normalize(raw)
    problems = []
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        *sections, name = key.strip().split(".")
        place: Any = config
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else None
        if not (equals and name and all(sections)):
            problems.append(f"--set {assignment}: not of the form key=value. Try train.steps=20.")
        elif not isinstance(place, dict):
            problems.append(f"--set {assignment}: {'.'.join(sections)} has no keys. Try train.steps=20.")
        else:
            place[name] = literal(text)
            config = normalize(config)
    if problems:
        raise ConfigError(*problems)
    return config


def normalize(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the nested dicts, short spellings written out: pipeline=2 is pipeline=dict(size=2)."""
    config: dict[str, Any] = _copy(raw)
    parallel, model = config.get("parallel"), config.get("model")
    if isinstance(parallel, dict):
        for key in ("pipeline", "context"):
            if key in parallel and not isinstance(parallel[key], dict):
                parallel[key] = {"size": parallel[key]}
    if isinstance(model, dict) and "_remove_final_layer_norm" in model and "remove_final_layer_norm" not in model:
        model["remove_final_layer_norm"] = model.pop("_remove_final_layer_norm")
    return config


def _make_ring(config: dict[str, Any]) -> list[str]:
    """In place: a tensor mode 'sequence' becomes a ring of that size. Returns what is wrong with it."""
    parallel = config.get("parallel")
    tensor = parallel.get("tensor") if isinstance(parallel, dict) else None
    if not isinstance(tensor, dict) or tensor.get("mode") != "sequence":
        return []
    size = tensor.pop("size", 1)
    del tensor["mode"]
    if "context" in config["parallel"]:
        return [f"parallel.tensor: mode 'sequence' is a ring, as parallel.context is. Try context={size} alone."]
    config["parallel"]["context"] = {"size": size}
    return []


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def parse(
    raw: Mapping[str, Any], *, world_size: int | None = None, resolve: Resolver | None = None, batches: bool = True
) -> Config:
    """The config that `raw` means; raises ConfigError with all of its problems. `batches`: the global batch size is
    meant, and must divide.

    Without a world size, what depends on one is not checked; without a resolver, what depends on the model is not.
    """
    reader, written_out = Reader(), normalize(raw)
    ring = _make_ring(written_out)
    config = reader.section(Config, written_out)
    problems = ring + reader.problems
    geometry = config.parallel.problems() if reader.sound("parallel") else []
    problems += geometry
    known_layout = reader.sound("parallel") and not geometry
    if known_layout and world_size is not None:
        world = config.parallel.world_problems(world_size)
        problems += world
        world_size = None if world else world_size
    if known_layout and reader.sound("train"):
        problems += config.microbatch_problems()
        problems += config.batch_problems(world_size) if batches else []
    if reader.sound("zero"):
        problems += config.zero.problems()
    if resolve is not None and reader.sound("model", "data"):
        # A model is worth checking beside a broken layout too: with no layout at all.
        config, unfit = resolve(config if known_layout else replace(config, parallel=ParallelConfig()))
        problems += unfit
    if problems:
        raise ConfigError(*problems)
    return config

"""The entry point for configs: a file or a dict, with overrides, becomes one frozen `Config` or one `ConfigError`."""

import json
import os
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from parallel.config.parallel import ParallelConfig
from parallel.config.reader import Reader, literal
from parallel.config.sections import Config
from parallel.errors import ConfigError, closest

Resolver: TypeAlias = Callable[[Config], tuple[Config, list[str]]]
"""Takes a config; returns it with the fields that depend on the model filled in, and what does not fit the model."""


def load_raw(path: str | Path) -> dict[str, Any]:
    """Return the names that a config file assigns, or the content of a run's config.json.

    Modules, functions and names that begin with an underscore are left out. `parse` refuses those that are no sections.
    Raises ConfigError, with the file and the line of the error.
    """
    file = Path(os.path.expanduser(path))
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
    """Return the message for an exception that the config file raised, with the last line in that file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return f"{file}:{lines[-1] if lines else 1}: {type(error).__name__}: {error}."


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
    """Return a copy of the nested dicts with short spellings written out: pipeline=2 becomes pipeline=dict(size=2)."""
    config: dict[str, Any] = _copy(raw)
    parallel, model = config.get("parallel"), config.get("model")
    if isinstance(parallel, dict):
        for key in ("pipeline", "context"):
            if key in parallel and not isinstance(parallel[key], dict):
                parallel[key] = {"size": parallel[key]}
    if isinstance(model, dict) and "_remove_final_layer_norm" in model and "remove_final_layer_norm" not in model:
        model["remove_final_layer_norm"] = model.pop("_remove_final_layer_norm")
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
        return [f"parallel.tensor: mode 'sequence' is a ring, as parallel.context is. Try context={size} alone."]
    config["parallel"]["context"] = {"size": size}
    return []


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def parse(
    raw: Mapping[str, Any], *, world_size: int | None = None, resolve: Resolver | None = None, batches: bool = True
) -> Config:
    """Return the config that `raw` describes; raise one ConfigError with all of its problems.

    Without a world size, what depends on one is not checked; without a resolver, what depends on the model is not.
    `batches`: whether the global batch size is used, and must therefore divide into microbatches and replicas.
    """
    reader, written_out = Reader(), normalize(raw)
    mode_problems = _replace_sequence_mode(written_out)
    config = reader.section(Config, written_out)
    problems = mode_problems + reader.problems
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
    if reader.could_read("zero"):
        problems += config.zero.problems()
    if resolve is not None and reader.could_read("model", "data"):
        # The model is checked even if the layout is wrong: as if it were not split at all.
        config, model_problems = resolve(config if is_layout_valid else replace(config, parallel=ParallelConfig()))
        problems += model_problems
    if problems:
        raise ConfigError(*problems)
    return config

"""The config of a run, from a file and what the command line overrides. This module needs no torch."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.shapes import MODEL_TYPE, resolve, shape_of
from parallel.config import Config, apply_overrides, load_raw, parse
from parallel.errors import ConfigError, shortened, shown

DEFAULT_NAME = "default"


def read_config(file: str | None, assignments: Sequence[str], world_size: int | None) -> Config:
    """Return the config of a file, or the built-in default, with KEY=VALUE assignments applied and every field set.

    `{name}` in `output.dir` becomes the name of the file. A callback that lies beside it becomes that of its own file.
    Raises ConfigError.
    """
    before = {} if file is None else load_raw(file)
    raw = apply_overrides(before, assignments)
    _check_model(before.get("model"), raw.get("model"), f"{file}")
    config = parse(raw, world_size=world_size, resolve=resolve)
    name, folder = (DEFAULT_NAME, Path()) if file is None else (Path(file).stem, Path(file).parent)
    output = replace(
        config.output,
        dir=config.output.dir.replace("{name}", name),
        callbacks=tuple(found_beside(folder, text) for text in config.output.callbacks),
    )
    return replace(config, output=output)


def found_beside(folder: Path, text: str) -> str:
    """Return a callback of a config in `folder`: by its file, if its module is there and not in the working directory.

    So the config.json of a run, which lies elsewhere, names the same class.
    """
    name, colon, attribute = text.partition(":")
    for suffix in (".py", "/__init__.py"):
        file = Path(f"{name.replace('.', '/')}{suffix}")
        if colon and not name.endswith(".py") and not os.path.exists(file) and os.path.exists(folder / file):
            return f"{(folder / file).resolve()}:{attribute}"
    return text


def _check_model(before: Any, model: Any, file: str) -> None:
    """Raise ConfigError where another model is named over a run's config.json, whose fields of its model would stay."""
    if not all(isinstance(section, Mapping) and MODEL_TYPE in section for section in (before, model)):
        return
    changed = {key: value for key, value in model.items() if key not in before or before[key] != value}
    named = [key for key in ("path", "name") if key in changed]
    if not named:
        return
    fresh = _fixed_fields({**{key: model[key] for key in ("name", "path") if key in model}, **changed})
    if fresh is not None and fresh != _fixed_fields(model):
        section = {key: changed[key] for key in named}
        raise ConfigError(
            f"model.{named[0]}: with {shown(changed[named[0]])} the fields of the other model, which {shortened(file)}"
            f' has, would stay. Replace the whole section: --set "model={section}".'
        )


def _fixed_fields(model: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the fields that the weights of a section's model fix, or None where the section is refused."""
    try:
        shape = shape_of(parse({"model": model}, resolve=resolve))
    except ConfigError:
        return None
    return {"model_type": shape.model_type} | {
        key: value for key, value in shape.exported().items() if key not in shape.may_change
    }


def override_messages(assignments: Sequence[str]) -> list[str]:
    """Return a message for each override."""
    return [f"overridden: {shortened(assignment)}" for assignment in assignments]

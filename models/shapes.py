"""The shape of the model that a config names: by the name of a size, or by a Hugging Face directory.

This module needs no torch.
"""

import json
from collections.abc import Mapping
from dataclasses import Field, asdict, fields, replace
from pathlib import Path
from typing import Any

from models.family import FAMILIES, Family, named_sizes
from models.fits import layout_problems
from models.model_folder import hub_advice, read_config
from models.shape import ModelShape
from parallel.config import Config, ModelConfig
from parallel.config.parsing import KEYS
from parallel.config.reader import Reader
from parallel.errors import ConfigError, did_you_mean, either, names_text, shown

MODEL_TYPE = "model_type"


def resolve(config: Config) -> tuple[Config, list[str]]:
    """Return the config with every field of its model set, and the problems: one line for each thing that does not fit.

    `parallel.config.parse` takes this function as its `resolve`.
    """
    try:
        shape = _shape_of(config.model)
    except ConfigError as error:
        return config, list(error.problems)
    problems = shape.problems()
    return replace(config, model=replace(config.model, fields=fields_of(shape))), problems + layout_problems(
        shape, config
    )


def shape_of(config: Config) -> ModelShape:
    """Return the shape of a config's model. Raises ConfigError where there is none."""
    if MODEL_TYPE in config.model.fields:  # what `resolve` has set
        return shape_from(config.model.fields)
    shape = _shape_of(config.model)
    if problems := shape.problems() + layout_problems(shape, config):
        raise ConfigError(*problems)
    return shape


def fields_of(shape: ModelShape) -> dict[str, Any]:
    """Return all fields of a shape and its model_type, as `shape_from` reads them again."""
    return {MODEL_TYPE: shape.model_type, **asdict(shape)}


def shape_from(found: Mapping[str, Any]) -> ModelShape:
    """Return the shape of which these are the fields, with its model_type; without one it is an OPT's.

    Raises ConfigError for fields that the family does not have.
    """
    family = FAMILIES[found.get(MODEL_TYPE, "opt")]
    return _read(family, {key: value for key, value in found.items() if key != MODEL_TYPE}, ("model",))


def from_hugging_face(path: str | Path) -> ModelShape:
    """Return the shape in DIR/config.json. A field that it leaves out has its class's default. Raises ConfigError.

    Fields that the family's Hugging Face class does not have are left out, as Hugging Face does.
    """
    file = Path(path) / "config.json"
    raw = read_config(path, FAMILIES)
    family = FAMILIES[raw[MODEL_TYPE]]
    wording = f"model.path: {{}} in {file}"
    if problems := _only_problems(family, raw, wording) + _twice_problems(family, raw, wording):
        raise ConfigError(*problems)
    known = {key.name for key in _fields(family)}
    found = {key: value for key, value in family.shape.normalized(raw).items() if key in known}
    return _read(family, found, (str(file),))


def _shape_of(model: ModelConfig) -> ModelShape:
    """Return the named or the read shape with the fields that the section sets.

    Raises ConfigError with all that is wrong in the section.
    """
    if model.path is not None:
        base = from_hugging_face(model.path)
    elif (named := named_sizes().get(model.name)) is not None:
        base = named
    else:
        raise ConfigError(f"model.name: {_unknown_model(model.name)}")
    family = FAMILIES[base.model_type]
    changes = dict(model.fields)
    problems = []
    if (kind := changes.pop(MODEL_TYPE, base.model_type)) != base.model_type:
        problems.append(_other_family(model, base, kind))
    problems += _only_problems(family, changes, "model.{}") + _twice_problems(family, changes, "model.{}")
    problems += base.change_problems(changes)
    changes = {key: value for key, value in changes.items() if key not in family.shape.only}
    changes = family.shape.normalized(changes)
    foreign = _foreign_problems(base, changes)
    problems += foreign.values()
    own = {key: value for key, value in changes.items() if key not in foreign}
    try:
        shape = _read(family, {**asdict(base), **own}, ("model",))
    except ConfigError as error:
        raise ConfigError(*problems, *error.problems) from error
    if problems:
        raise ConfigError(*problems, *shape.problems())
    return shape


def _read(family: Family, raw: Mapping[str, Any], path: tuple[str, ...]) -> ModelShape:
    """Return the family's shape with these fields. Raises ConfigError with all that is wrong with them."""
    reader = Reader(sections=KEYS)
    shape = reader.section(family.shape, raw, path)
    if reader.problems:
        raise ConfigError(*reader.problems)
    return shape


def _fields(family: Family) -> tuple[Field[Any], ...]:
    return fields(family.shape)


def _only_problems(family: Family, raw: Mapping[str, Any], wording: str) -> list[str]:
    """Return a line for each field of Hugging Face's that has a value which is not supported."""
    return [
        f"{wording.format(key)}: {_plain(raw[key])} is not supported. Try {either(map(_plain, values))}."
        for key, values in family.shape.only.items()
        if key in raw and raw[key] not in values
    ]


def _twice_problems(family: Family, raw: Mapping[str, Any], wording: str) -> list[str]:
    """Return a line for each field that has two values, under two of its names."""
    return [
        f"{wording.format(own)}: it is given as {_plain(raw[own])} and as {_plain(raw[key])}, once under the name"
        f" {key}. Keep one."
        for key, own in family.shape.aliases.items()
        if key in raw and own in raw and raw[key] != raw[own]
    ]


def _plain(value: object) -> str:
    """Return a value as a config file has it, shortened."""
    try:
        return shown(json.loads(json.dumps(value)))
    except (TypeError, ValueError):
        return shown(value)


def _other_family(model: ModelConfig, base: ModelShape, kind: object) -> str:
    """Return the message about a model_type that is not that of the model which `name` or `path` gives."""
    sizes = FAMILIES[kind].sizes if model.path is None and isinstance(kind, str) and kind in FAMILIES else ()
    other = f", or model.name={next(iter(sizes))!r}" if sizes else ""
    where = shown(model.name if model.path is None else model.path)
    return f"model.model_type: {shown(kind)} is not that of {where}. Try {base.model_type!r}{other}."


def _foreign_problems(base: ModelShape, changes: Mapping[str, Any]) -> dict[str, str]:
    """Return a line for each field that only other families have, by the field."""
    own = [key.name for key in _fields(FAMILIES[base.model_type])]
    found: dict[str, str] = {}
    for key in changes:
        others = [kind for kind, family in FAMILIES.items() if key in {field.name for field in _fields(family)}]
        if key not in own and others:
            found[key] = (
                f"model.{key}: unknown key. It is a field of {names_text(others)}, and the model is of the family"
                f" {base.model_type}. {did_you_mean(key, own)}"
            )
    return found


def _unknown_model(name: str) -> str:
    """Return the message about a model that is not known by its name."""
    own, sizes = name.rpartition("/")[2], named_sizes()
    if advice := hub_advice(name):
        drawn = (
            f" Or set model.name={own.lower()!r}, with weights drawn from train.seed." if own.lower() in sizes else ""
        )
        return f"{name!r} is no name of a shape. {advice}{drawn}"
    return f"unknown model {shown(name)}. {did_you_mean(name, sizes)}"

"""The config of a generation: the layout of a training's config, around a trained model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.fits import layout_problems
from models.generation.trained_model import TrainedModel
from models.shapes import fields_of
from parallel.config import Config, ParallelConfig, apply_overrides, load_raw, normalize, parse
from parallel.engine.inference import context_problem
from parallel.errors import ConfigError, names_text

READ = {"parallel": None, "zero": None, "train": ("device", "precision", "compile", "timeout_seconds")}
"""The sections of a config that generation reads, and the keys of those of which it reads only some."""


def config_for(
    trained: TrainedModel, file: str | Path | None, assignments: Sequence[str], *, dtype: str | None, world_size: int
) -> Config:
    """Return the config by which a trained model is laid out: as a config file and KEY=VALUE assignments say.

    Of a file the sections of `READ` are read, and only these may be assigned. Without a precision in either, and
    without `dtype`, it is that of the weights; bf16 in the place of fp8, whose scales belong to a training. Raises
    ConfigError.
    """
    raw = _read_of({} if file is None else load_raw(file))
    raw = apply_overrides(raw, assignments)
    if unused := _unused(raw):
        raise ConfigError(
            f"--set {names_text(unused)}: generation does not read it. Of a config it reads"
            f" {names_text(_names_read())}."
        )
    if (size := _size(raw, "context")) != 1:  # before a length is asked for that it splits
        raise ConfigError(context_problem(size))
    precision = dtype or raw.get("train", {}).get("precision") or trained.precision
    parts = _size(raw, "tensor")  # the number of parts into which the mode splits a batch divides it
    precision = "bf16" if precision == "fp8" else precision
    training = dict(precision=precision, micro_batch_size=parts if isinstance(parts, int) and parts > 0 else 1)
    raw["train"] = raw.get("train", {}) | training
    raw["data"] = dict(sequence_length=2)
    raw["model"] = {} if trained.is_checkpoint else dict(path=str(trained.folder))

    def resolve(config: Config) -> tuple[Config, list[str]]:
        model = replace(config.model, fields=fields_of(trained.shape))
        config = replace(config, model=model, parallel=_with_whole_sequences(config.parallel))
        return config, trained.shape.problems() + layout_problems(trained.shape, config)

    return parse(raw, world_size=world_size, resolve=resolve, batches=False)


def _with_whole_sequences(parallel: ParallelConfig) -> ParallelConfig:
    """Return the layout in plain 1d where it has sequence parallelism: a new token is a single position.

    The layouts of all parameters are the same.
    """
    return replace(parallel, tensor=replace(parallel.tensor, sequence_parallel=False))


def _read_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that generation reads."""
    kept: dict[str, Any] = {}
    for section, keys in READ.items():
        if isinstance(found := raw.get(section, {}), Mapping):
            kept[section] = {key: value for key, value in found.items() if keys is None or key in keys}
    return kept


def _unused(raw: Mapping[str, Any]) -> list[str]:
    """Return the keys, with dots, of which generation has no use."""
    read = _read_of(raw)
    found = [section for section in raw if section not in read]
    return found + [f"{section}.{key}" for section in read for key in raw[section] if key not in read[section]]


def _names_read() -> list[str]:
    return [f"{section}.{key}" for section, keys in READ.items() for key in keys or ("*",)]


def _size(raw: Mapping[str, Any], axis: str) -> object:
    """Return the size of parallel.tensor or parallel.context in a config that has not been checked, 1 by default."""
    parallel = normalize(raw).get("parallel")
    section = parallel.get(axis) if isinstance(parallel, Mapping) else None
    return section.get("size", 1) if isinstance(section, Mapping) else 1

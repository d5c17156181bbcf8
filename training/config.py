"""The config of a run, from a file and what the command line overrides. This module needs no torch."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from models.shapes import resolve
from parallel.config import Config, apply_overrides, load_raw, parse
from parallel.errors import shortened

DEFAULT_NAME = "default"


def read_config(file: str | None, assignments: Sequence[str], world_size: int | None) -> Config:
    """Return the config of a file, or the built-in default, with KEY=VALUE assignments applied and every field set.

    `{name}` in `output.dir` becomes the name of the file. Raises ConfigError.
    """
    raw = apply_overrides({} if file is None else load_raw(file), assignments)
    config = parse(raw, world_size=world_size, resolve=resolve)
    name = DEFAULT_NAME if file is None else Path(file).stem
    return replace(config, output=replace(config.output, dir=config.output.dir.replace("{name}", name)))


def override_messages(assignments: Sequence[str]) -> list[str]:
    """Return a message for each override."""
    return [f"overridden: {shortened(assignment)}" for assignment in assignments]

"""The config.json of a Hugging Face directory, and advice for a path that is no such directory.

This module needs no torch.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from parallel.errors import ConfigError, shortened, shown
from parallel.regular_file import is_missing, read_json, with_key

MOST_BYTES = 1 << 20

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{,95}/[A-Za-z0-9][\w.-]{,95}")


def read_config(path: str | Path, families: Iterable[str]) -> dict[str, Any]:
    """Return the content of DIR/config.json, whose `model_type` is one of these families. Raises ConfigError."""
    file = Path(path) / "config.json"
    name = shortened(str(file))
    if is_missing(file):
        raise ConfigError(f"model.path: cannot read {name}: it does not exist. {_advice(Path(path))}")
    raw = read_json(file, with_key(ConfigError, "model.path"), at_most=MOST_BYTES, links=True)
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    known = tuple(families)
    if kind not in known:
        raise ConfigError(
            f"model.path: {name} describes model_type {shown(kind)}. Available: {', '.join(map(repr, known))}."
        )
    if raw.get("quantization_config") is not None:
        raise ConfigError(f"model.path: quantization_config in {name} is not available. Try the model's own weights.")
    return dict(raw)


def _advice(path: Path) -> str:
    """Return what would work instead of a path that has no config.json."""
    if os.path.isfile(path):
        return f"It is a file: try its directory, {str(path.parent)!r}."
    inner = [path / "export", *sorted(path.glob("snapshots/*"))]
    if found := next((folder for folder in inner if os.path.isfile(folder / "config.json")), None):
        return f"Try {found}."
    if os.path.isdir(path):
        return "The directory has none. Try a Hugging Face directory, as save_pretrained writes it."
    return hub_advice(str(path)) or "Try a Hugging Face directory."


def hub_advice(name: str) -> str:
    """Return how to save a model of the Hugging Face hub, if this may be the name of one; else an empty string."""
    if not HUB_NAME.fullmatch(name) or os.path.exists(name):
        return ""
    return (
        f"If {name} is a model of the Hugging Face hub, save it in a directory first, which model.path names then:"
        f" AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(DIR) and"
        f" AutoTokenizer.from_pretrained({name!r}).save_pretrained(DIR)."
    )

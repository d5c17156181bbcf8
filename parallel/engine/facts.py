"""The facts by which a rank was started, and which must be the same on all: config, code, versions and world."""

import hashlib
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from parallel.config import Config
from parallel.engine.device import device_type


def facts_of(config: Config, world_size: int) -> dict[str, Any]:
    """Return the facts of this rank by key: each key of the config, the world, the device, versions, and the code."""
    file = config.parallel.pipeline.file
    return {
        **dict(_flat(config.to_dict())),
        "parallel.pipeline.schedule, digest": None if file is None else file.digest[:16],
        "world size": world_size,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "device": device_type(config.train.device),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "code of parallel": digest_of_code(Path(__file__).parents[1]),
    }


def digest_of_code(folder: Path) -> str:
    """Return a digest of the Python files in a folder: of their names and of what is in them."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        total.update(f"{file.relative_to(folder)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()[:16]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts, with dotted keys: {"optimizer": {"lr": 0.1}} -> ("optimizer.lr", 0.1)."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value

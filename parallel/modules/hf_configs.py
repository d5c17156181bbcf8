"""The config files of a Hugging Face directory."""

import tempfile
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parallel.errors import CheckpointError


def write_hf_configs(module: nn.Module, dtype: torch.dtype, folder: Path) -> None:
    """Write the configs that `from_pretrained` reads, where the module has them; `dtype` is that of the weights.

    Raises CheckpointError where Hugging Face refuses to save one, and OSError.
    """
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "save_pretrained"):
        return
    saved = copy(config)
    saved.dtype, saved.architectures = dtype, [type(getattr(module, "_orig_mod", module)).__name__]
    _save("config", saved, folder)
    generation: Any = getattr(module, "generation_config", None)
    if generation is not None:
        _save("generation_config", generation, folder)


def problem_of_configs(module: nn.Module) -> str:
    """Return why the module's configs could not be saved later, or an empty text: before training it can be mended."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            write_hf_configs(module, torch.float32, Path(folder))
    except CheckpointError as error:
        return str(error)
    except OSError:
        pass  # there is no room for temporary files here, which says nothing of the configs
    return ""


def _save(name: str, config: Any, folder: Path) -> None:
    try:
        config.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # transformers raises ValueError, TypeError and errors of its own
        reason = " ".join(str(error).split()).split(" If you're using")[0]
        raise CheckpointError(
            f"model.{name}: Hugging Face refuses to save it: {reason} Correct model.{name} first."
        ) from error

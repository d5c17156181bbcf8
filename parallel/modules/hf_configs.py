"""The config files of a Hugging Face directory."""

from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn


def write_hf_configs(module: nn.Module, dtype: torch.dtype, folder: Path) -> None:
    """Write the configs that `from_pretrained` reads, where the module has them; `dtype` is that of the weights."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "save_pretrained"):
        return
    saved = copy(config)
    saved.dtype, saved.architectures = dtype, [type(module).__name__]
    saved.save_pretrained(folder)
    generation: Any = getattr(module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)

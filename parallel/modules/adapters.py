"""Models of peft, as far as an export has to know them: their adapters, and the model with the adapters merged into it.

Nothing here depends on peft, which is optional: it is imported where a module has its attributes.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from parallel.errors import ModelError


def has_adapters(module: nn.Module) -> bool:
    """Return whether the module is a model of peft, or one into which transformers has injected peft's adapters."""
    return isinstance(getattr(module, "peft_config", None), dict)


def refuse_merge(module: nn.Module) -> None:
    """Raise ModelError where a module has no adapters that can be merged into its weights."""
    name = type(module).__name__
    if not has_adapters(module):
        raise ModelError(f"save_pretrained: merge=True merges the adapters of a peft model, and {name} is none.")
    if not hasattr(module, "merge_and_unload"):
        configs: Any = module.peft_config
        kinds = ", ".join(str(config.peft_type.value) for config in configs.values())
        raise ModelError(
            f"save_pretrained: merge=True is not possible for {name} with {kinds}: it has no merge_and_unload. Leave"
            " merge out to save the adapter."
        )


def weights_shared_by_chance(module: nn.Module) -> list[tuple[nn.Parameter, list[str]]]:
    """Return each parameter that has several names of which peft treats one without the others, with its names.

    An adapter that is merged into such a weight changes what the other names stand for, too. (Wrappers that merge in a
    way of their own know which modules are tied.)
    """
    own = {name for name, part in module.named_modules() if hasattr(part, "unload_and_optionally_merge_module")}
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [
        (parameter, found)
        for parameter, found in names.items()
        if len(found) > 1 and not all(any(name.startswith(f"{wrapper}.") for wrapper in own) for name in found)
    ]


def adapter_tensors(module: Any, adapter: str) -> dict[str, Tensor]:
    """Return the tensors of an adapter under the names by which peft saves them."""
    from peft import get_peft_model_state_dict

    found: dict[str, Tensor] = get_peft_model_state_dict(module, adapter_name=adapter)
    prefix = "" if hasattr(module, "get_base_model") else "base_model.model."  # transformers saves injected ones so
    return {f"{prefix}{name}": x for name, x in found.items()}


def adapter_folders(module: Any, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name of each adapter, and its folder: peft puts all but the default one into folders of their own."""
    for name in module.peft_config:
        yield name, folder if name == "default" else folder / name


def write_adapter_config(module: Any, adapter: str, folder: Path) -> None:
    """Write adapter_config.json as peft's save_pretrained does: for inference, with the name of the base model."""
    config = copy.copy(module.peft_config[adapter])
    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    config.inference_mode = True
    config.base_model_name_or_path = config.base_model_name_or_path or getattr(base, "name_or_path", None) or None
    origin = dict(base_model_class=type(base).__name__, parent_library=type(base).__module__)
    config.save_pretrained(str(folder), auto_mapping_dict=origin if config.task_type is None else None)

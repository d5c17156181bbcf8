"""The families of models, by Hugging Face's `model_type`. This module needs no torch.

A family is a folder beside this file and an entry in `FAMILIES`: docs/adding_a_model.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from models.gpt2.shape import SIZES as GPT2_SIZES
from models.gpt2.shape import GPT2Shape
from models.llama.shape import LlamaShape, MinistralShape, MistralShape, Qwen2Shape, Qwen3Shape
from models.llama.sizes import LLAMA, MISTRAL, QWEN2, QWEN3
from models.opt.shape import SIZES as OPT_SIZES
from models.opt.shape import OPTShape
from models.shape import ModelShape
from parallel.errors import ModelError


@dataclass(frozen=True)
class Family:
    """A family: the dataclass of its shapes, its sizes by name, and the module of its layers.

    The module, which needs torch and is imported when a model is built, has `layers_of(shape, mode, seed)`.
    """

    shape: type[ModelShape]
    sizes: Mapping[str, ModelShape]
    layers: str

    def __post_init__(self) -> None:
        """Check that the dataclass has all that is asked of it by name. What it lacks would be missed late in a run."""
        kind = self.shape.__name__
        lacks = [name for name in ("model_type", "architecture", "may_change") if not hasattr(self.shape, name)]
        if lacks := lacks + sorted(self.shape.__abstractmethods__):
            raise ModelError(f"{kind} lacks {', '.join(lacks)}. See ModelShape.")
        known = {field.name for field in fields(self.shape)} | ModelShape.__annotations__.keys() | set(dir(ModelShape))
        for name, value in vars(self.shape).items():
            is_code = callable(value) or isinstance(value, property | classmethod | staticmethod)
            if name not in known and not name.startswith("_") and not is_code:
                raise ModelError(
                    f"{kind}.{name}: it has no type, so it is no field, and ModelShape asks for nothing of this name."
                    f" Write {name}: {type(value).__name__} = {value!r}."
                )


FAMILIES: dict[str, Family] = {
    "gpt2": Family(GPT2Shape, GPT2_SIZES, "models.gpt2.layers"),
    "llama": Family(LlamaShape, LLAMA, "models.llama.layers"),
    "ministral": Family(MinistralShape, {}, "models.llama.layers"),
    "mistral": Family(MistralShape, MISTRAL, "models.llama.layers"),
    "opt": Family(OPTShape, OPT_SIZES, "models.opt.layers"),
    "qwen2": Family(Qwen2Shape, QWEN2, "models.llama.layers"),
    "qwen3": Family(Qwen3Shape, QWEN3, "models.llama.layers"),
}

for _kind, _family in FAMILIES.items():
    assert _kind == _family.shape.model_type, f"{_family.shape.__name__}.model_type is not {_kind!r}"


def named_sizes() -> dict[str, ModelShape]:
    """Return the shapes of all families by the names that `model.name` may have."""
    return {name: shape for family in FAMILIES.values() for name, shape in family.sizes.items()}

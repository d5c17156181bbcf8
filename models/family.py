"""The families of models, by Hugging Face's `model_type`. This module needs no torch.

A family is a folder beside this file and an entry in `FAMILIES`: docs/adding_a_model.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from models.opt.shape import SIZES as OPT_SIZES
from models.opt.shape import OPTShape
from models.shape import ModelShape


@dataclass(frozen=True)
class Family:
    """A family: the dataclass of its shapes, its sizes by name, and the module of its layers.

    The module, which needs torch and is imported when a model is built, has `layers_of(shape, mode, seed)`.
    """

    shape: type[ModelShape]
    sizes: Mapping[str, ModelShape]
    layers: str


FAMILIES: dict[str, Family] = {
    "opt": Family(OPTShape, OPT_SIZES, "models.opt.layers"),
}


def named_sizes() -> dict[str, ModelShape]:
    """Return the shapes of all families by the names that `model.name` may have."""
    return {name: shape for family in FAMILIES.values() for name, shape in family.sizes.items()}

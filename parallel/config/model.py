"""The `model` section of a config. Its fields besides `name` and `path` are those of the model's family."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from parallel.config.reader import PathText, Rest


@dataclass(frozen=True)
class ModelConfig:
    """The section `model`: a named size or a Hugging Face directory, and what to change in it."""

    name: str = "opt-tiny"
    """The name of a size, such as opt-1.3b, llama-3.2-1b or gpt2; docs/models.md lists all. opt-tiny has 1.1 million
    parameters, for tests on a CPU. Not used if `path` is given.
    """

    path: PathText | None = None
    """A directory in Hugging Face's format: its config.json gives the family and the shape, and its safetensors, if
    there are any, the weights. None: the shape of `name`, with weights drawn from `train.seed`.
    """

    fields: Annotated[Mapping[str, Any], Rest()] = field(default_factory=dict)
    """Every other key of the section, such as hidden_size: fields of the family's own Hugging Face config, which the
    family checks. In a config that has been resolved these are all of its fields, and `model_type`.
    """

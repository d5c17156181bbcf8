"""Hugging Face directories of every family: we read what transformers writes, and it reads back the same bits."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from models import hf
from models.costs import parameter_count
from models.shapes import from_hugging_face
from parallel.checkpoint import hf_folder
from tests.families import SHAPES, family_of
from tests.harness import run
from tests.parity import Raw, config_of, engine_of, named_as_in_files
from tests.test_parity import LAYOUTS

NAMES = [name for name in SHAPES if family_of(name) != "opt"]
NOT_OURS = ("_name_or_path", "dtype", "transformers_version", "use_cache")
"""Fields of a config that say how transformers runs a model, and from where, not what it is."""


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family_of(name), **SHAPES[name]))
    for parameter in model.parameters():  # all elements differ, those of biases and norms too
        nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_public_tensors_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    model = model_of(name)
    model.save_pretrained(tmp_path)
    shape = from_hugging_face(tmp_path)
    assert shape.public_tensors() == {key: tuple(x.shape) for key, x in named_as_in_files(model).items()}
    assert parameter_count(shape) == model.num_parameters()
    hf.check_weights(tmp_path, shape)


def load_and_export(rank: int, world_size: int, raw: Raw, target: Path) -> None:
    """Build the model of a directory in parts, and export it again in shards of at most 8 kB."""
    engine = engine_of(rank, world_size, raw)
    shape = from_hugging_face(raw["model"]["path"])
    with patch.object(hf_folder, "MAX_SHARD_BYTES", 8000):
        hf.export(target, engine.weights(), shape=shape, axis=engine.mesh.world, dtype=torch.float32)


LAYOUT_OF = {"llama": "1d3", "mistral": "2d4", "qwen2": "pp2", "qwen3": "1d2", "gpt2": "1d4"}
"""The layout in which a family is read and written; variants are on one rank."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shards", [pytest.param("1GB", marks=pytest.mark.slow), "8KB"])
def test_transformers_reads_back_bit_for_bit_what_it_wrote(tmp_path: Path, name: str, shards: str) -> None:
    source, target = tmp_path / "source", tmp_path / "run" / "export"
    model = model_of(name)
    model.save_pretrained(source, max_shard_size=shards)
    assert (source / "model.safetensors.index.json").exists() == (shards == "8KB")
    world_size, parallel = LAYOUTS[LAYOUT_OF.get(name, "single")]
    raw = config_of(parallel, precision="fp32", model=dict(path=str(source)))
    run(load_and_export, world_size, raw, target)
    again = AutoModelForCausalLM.from_pretrained(target)
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    theirs, ours = (AutoConfig.from_pretrained(folder).to_dict() for folder in (source, target))
    # Qwen2's class has no head_dim, but its model uses one that a file has.
    assert ours.keys() - theirs.keys() <= {"head_dim"}
    assert {key: ours[key] for key in theirs if key not in NOT_OURS} == {
        key: theirs[key] for key in theirs if key not in NOT_OURS
    }
    ids = torch.arange(6)[None]
    assert torch.equal(model.eval()(ids).logits, again.eval()(ids).logits)
    assert again.generation_config.eos_token_id == model.generation_config.eos_token_id


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_of_a_familys_bare_model_are_read_too(tmp_path: Path, name: str) -> None:
    """A model without its head saves names without the prefix that the model with a head adds."""
    model = model_of("llama-yarn" if name == "llama" else name)  # whose head is tied: the bare model has no other
    model.base_model.save_pretrained(tmp_path / "bare")
    run(load_and_export, 1, config_of({}, precision="fp32", model=dict(path=str(tmp_path / "bare"))), tmp_path / "own")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in model.state_dict().items())

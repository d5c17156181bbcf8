"""sharded_init: models that are loaded or constructed without any rank holding one whole have the usual values."""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import parallel
from parallel.mesh.mesh import ALONE
from parallel.modules.construction import construction
from parallel.modules.sharded import is_sharded, unshard_parameter
from parallel.ops.placeholder import placeholder
from tests.accounts import Allocations
from tests.harness import run
from tests.parity import SHAPE

Values = dict[str, Tensor]

OPT: dict[str, Any] = SHAPE
LLAMA: dict[str, Any] = dict(
    vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, bos_token_id=0
)
GPT2: dict[str, Any] = dict(
    n_embd=24, n_layer=2, n_head=4, vocab_size=37, n_positions=16, bos_token_id=0, eos_token_id=0
)
DEEP: dict[str, Any] = SHAPE | dict(num_hidden_layers=6)


class Plain(nn.Module):
    """A module with parameters of every kind, initialized in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5, padding_idx=2), nn.Linear(5, 7)
        self.head.weight = self.embed.weight  # tied
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.low = nn.Linear(3, 3).to(torch.bfloat16)
        self.by_hand = nn.Parameter(torch.randn(13))  # prime
        self.counted = nn.Parameter(torch.arange(4), requires_grad=False)
        self.single, self.nothing = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.empty(0))
        self.list = nn.ParameterList(nn.Parameter(torch.full((2,), float(i))) for i in range(2))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 6), 2, enable_nested_tensor=False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 5))
        self.lstm = nn.LSTM(2, 3)
        self.apply(self.initialize)

    def initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and module.out_features == 7:
            nn.init.uniform_(module.weight, 2, 3)
            nn.init.trunc_normal_(module.bias, std=1.0, a=-0.1, b=0.2)
        elif isinstance(module, nn.Linear) and module is self.frozen:
            nn.init.orthogonal_(module.weight)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "plain": Plain,
}


def launch(rank: int, world_size: int, stage: int) -> None:
    """Do as a script under torchrun does, in ranks that have joined a process group already."""
    config = dict(zero=dict(stage=stage), train=dict(global_batch_size=12, micro_batch_size=1, device="cpu"))
    with patch.dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1"):
        parallel.launch_from_torch(config)


def values_of(model: nn.Module, *, sharded: bool) -> Values:
    """Return every parameter's values; all of them must be sharded, and are then gathered, or none.

    Whole numbers are no weights: no chunk takes them over, so every rank keeps them whole.
    """
    values = {}
    for name, parameter in model.named_parameters():
        assert is_sharded(parameter) == (sharded and parameter.is_floating_point()), name
        assert parameter.device.type == "cpu", name
        if is_sharded(parameter):
            values[name] = torch.empty(parameter.shape, dtype=parameter.dtype)
            unshard_parameter(parameter, values[name])
            assert not is_sharded(parameter)
        else:
            values[name] = parameter.detach().clone()
    return values


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save models, in several files each; `twice` has the tied weight under both of its names."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("opt", "llama", "deep", "twice", "missing")}
    torch.manual_seed(1)
    kinds: dict[str, dict[str, Any]] = dict(opt=SHAPE, deep=DEEP, twice=SHAPE, missing=SHAPE)
    models = {name: OPTForCausalLM(OPTConfig(**shape)) for name, shape in kinds.items()}
    for name, model in (models | dict(llama=LlamaForCausalLM(LlamaConfig(**LLAMA)))).items():
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        model.save_pretrained(found[name], max_shard_size="12KB")
        assert len(list(found[name].glob("*.safetensors"))) > 2
    embedding, head = "model.decoder.embed_tokens.weight", "lm_head.weight"
    edit(found["twice"], embedding, lambda tensors: tensors | {head: tensors[embedding].clone()})
    edit(found["missing"], LOST, lambda tensors: {name: x for name, x in tensors.items() if name != LOST})
    return found


LOST = "model.decoder.layers.1.fc1.bias"


def edit(folder: Path, name: str, change: Callable[[Values], Values]) -> None:
    """Change the file that has this tensor, and the index accordingly."""
    listing = folder / "model.safetensors.index.json"
    index = json.loads(listing.read_text())
    file = index["weight_map"].pop(name)
    tensors = change(load_file(folder / file))
    save_file(tensors, folder / file, metadata=dict(format="pt"))
    index["weight_map"] |= dict.fromkeys(tensors, file)
    listing.write_text(json.dumps(index))


@dataclass
class Loaded:
    values: Values
    tied: bool
    trainable: bool
    cast: Values  # loaded as bf16, cast to fp16 before it is gathered


def load(rank: int, world_size: int, folders: dict[str, Path], stage: int) -> dict[str, Loaded]:
    launch(rank, world_size, stage)
    sharded = stage == 3 and world_size > 1
    found = {}
    for name, kind in (("opt", OPTForCausalLM), ("llama", LlamaForCausalLM), ("twice", OPTForCausalLM)):
        with parallel.sharded_init():
            model = kind.from_pretrained(folders[name])
            cast = kind.from_pretrained(folders[name], dtype=torch.bfloat16)
        tied = model.get_input_embeddings().weight is model.lm_head.weight
        trainable = all(parameter.requires_grad for parameter in model.parameters())
        cast_values = values_of(nn.Module.half(cast), sharded=sharded)
        found[name] = Loaded(values_of(model, sharded=sharded), tied, trainable, cast_values)
    return found


@pytest.mark.parametrize(("world_size", "stage"), [(1, 3), (2, 0), (2, 1), (2, 2), (2, 3), (3, 3)])
def test_a_model_loaded_in_shards_is_the_one_that_from_pretrained_loads(
    folders: dict[str, Path], world_size: int, stage: int
) -> None:
    for found in run(load, world_size, folders, stage):
        for name, kind in (("opt", OPTForCausalLM), ("llama", LlamaForCausalLM), ("twice", OPTForCausalLM)):
            want, got = dict(kind.from_pretrained(folders[name]).named_parameters()), found[name]
            assert got.values.keys() == want.keys()
            assert got.tied == (name != "llama")
            assert got.trainable
            for key, parameter in want.items():
                assert torch.equal(got.values[key], parameter), (name, key)
                assert torch.equal(got.cast[key], parameter.bfloat16().half()), (name, key)


@dataclass
class Built:
    values: Values
    tied: list[tuple[str, ...]]
    frozen: list[str]
    drawn_next: Tensor


def build(rank: int, world_size: int, stage: int, seeds: list[int]) -> dict[str, Built]:
    launch(rank, world_size, stage)
    found = {}
    for name, construct in MODELS.items():
        torch.manual_seed(seeds[rank])
        with parallel.sharded_init():
            model = construct()
        drawn = torch.rand(2)
        names: dict[int, list[str]] = {}
        for key, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(key)
        tied = [tuple(group) for group in names.values() if len(group) > 1]
        frozen = [key for key, parameter in model.named_parameters() if not parameter.requires_grad]
        found[name] = Built(values_of(model, sharded=stage == 3 and world_size > 1), tied, frozen, drawn)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Built]:
    return run(build, 1, 0, [5])[0]


@pytest.mark.parametrize(("world_size", "stage"), [(1, 3), (2, 0), (2, 3), (3, 3)])
def test_a_model_constructed_in_shards_has_one_seeds_values_in_every_stage_on_any_ranks(
    alone: dict[str, Built], world_size: int, stage: int
) -> None:
    """The values follow from the first rank's seed; each rank has another."""
    for found in run(build, world_size, stage, [5, 6, 7][:world_size]):
        for name, want in alone.items():
            got = found[name]
            assert (got.values.keys(), got.tied, got.frozen) == (want.values.keys(), want.tied, want.frozen)
            for key, value in want.values.items():
                assert torch.equal(got.values[key], value), (name, key)
            assert torch.equal(got.drawn_next, want.drawn_next)


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])
def test_random_values_follow_hugging_faces_rules(alone: dict[str, Built], name: str) -> None:
    """Constants are equal. A standard deviation estimated from N elements has a relative error of 1/√(2N): six times
    that is allowed for each of the two models.
    """
    torch.manual_seed(0)
    model = MODELS[name]()
    assert alone[name].tied == ([] if name == "llama" else [tied_names(model)])
    for key, parameter in model.named_parameters():
        got = alone[name].values[key]
        if parameter.min() == parameter.max():
            assert torch.equal(got, parameter), key
        else:
            assert abs(got.std() / parameter.std() - 1) < 2 * 6 / math.sqrt(2 * parameter.numel()), key
            assert abs(got.mean()) < 6 * parameter.std() / math.sqrt(parameter.numel()), key
            assert got.unique().numel() > 0.9 * got.numel(), key
    if name == "opt":
        assert not alone[name].values["model.decoder.embed_tokens.weight"][1].any()


def tied_names(model: nn.Module) -> tuple[str, ...]:
    head = model.get_parameter("lm_head.weight")
    shared = [name for name, x in model.named_parameters(remove_duplicate=False) if x is head]
    return tuple(shared)


def test_a_users_own_initialization_is_kept(alone: dict[str, Built]) -> None:
    built = alone["plain"]
    values, (copied, original) = built.values, ("encoder.layers.1", "encoder.layers.0")
    assert built.tied == [("embed.weight", "head.weight")]
    assert built.frozen == ["counted", "frozen.weight", "frozen.bias"]
    assert values["embed.weight"].min() >= 2  # drawn again by the model, padding row included
    assert values["head.bias"].abs().max() <= 0.2
    assert values["low.weight"].dtype == torch.bfloat16
    rows = values["frozen.weight"]
    assert torch.allclose(rows @ rows.T, torch.eye(3), atol=1e-6)  # a few roundings of fp32
    assert values["counted"].tolist() == [0, 1, 2, 3]
    assert values["list.1"].tolist() == [1, 1]
    for key, value in values.items():
        if key.startswith(original):
            assert torch.equal(value, values[key.replace(original, copied)]), key
    direction = values["normed.parametrizations.weight.original1"]
    assert torch.equal(values["normed.parametrizations.weight.original0"], direction.norm(dim=1, keepdim=True))


class Seen(Allocations):
    """Counts also the tensors that are registered: a reader of files makes tensors without torch's dispatch."""

    def _register(self, tree: Any, *, is_new: bool) -> None:
        leaves = tree_leaves(tree)
        strided = [x for x in leaves if isinstance(x, Tensor) and x.untyped_storage().device.type != "meta"]
        super()._register(strided, is_new=True)

    def see(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        self._register(parameter, is_new=True)
        self.peak = max(self.peak, self.now)


@contextmanager
def seen() -> Iterator[Seen]:
    with Seen() as held:
        hook = torch_module.register_module_parameter_registration_hook(held.see)
        try:
            yield held
        finally:
            hook.remove()


class Overwritten(nn.Module):
    """A module whose parameters have values before its initialization, and about as many as the deep OPT."""

    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList(nn.Parameter(torch.ones(300)) for _ in range(90))
        for parameter in self.list:
            nn.init.normal_(parameter)


def peaks(rank: int, world_size: int, folder: Path) -> dict[str, int]:
    launch(rank, world_size, 3)
    found = {}
    makes: dict[str, Callable[[], nn.Module]] = {
        "loaded": lambda: OPTForCausalLM.from_pretrained(folder),
        "constructed": lambda: OPTForCausalLM(OPTConfig(**DEEP)),
        "overwritten": Overwritten,
    }
    for name, make in makes.items():
        with seen() as held, parallel.sharded_init():
            model = make()
        found[name] = held.peak
        del model
    return found


def test_a_rank_holds_its_shards_and_one_parameter_at_most(folders: dict[str, Path]) -> None:
    """It also holds a few numbers for each parameter (its placeholder, padding, a scalar), the state of torch's
    generator, while it draws with another, and the two numbers by which ranks agree.
    """
    for found in run(peaks, 2, folders["deep"]):
        for name, peak in found.items():
            model = Overwritten() if name == "overwritten" else OPTForCausalLM(OPTConfig(**DEEP))
            sizes = [parameter.nbytes for parameter in model.parameters()]
            bound = sum(sizes) // 2 + max(sizes) + 16 * len(sizes) + 2 * torch.get_rng_state().nbytes
            assert sum(sizes) // 2 < peak < bound < 0.8 * sum(sizes), (name, peak, bound)


@dataclass
class Drawn:
    values: Values
    said: list[str]  # by the library's own log
    is_clean: bool  # torch and the environment are restored


def draw(rank: int, world_size: int, folder: Path, stage: int) -> Drawn:
    launch(rank, world_size, stage)
    torch.manual_seed(3 + rank)
    with patch("parallel.modules.construction.log.warning") as warn, parallel.sharded_init():
        model = OPTForCausalLM.from_pretrained(folder)
    said = [call.args[0] % call.args[1:] for call in warn.call_args_list]
    hooks = (
        torch_module._global_parameter_registration_hooks,
        torch_module._global_module_registration_hooks,
        torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
        torch.overrides._get_current_function_mode_stack(),
    )
    is_clean = not any(map(len, hooks)) and "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ
    return Drawn(values_of(model, sharded=stage == 3 and world_size > 1), said, is_clean)


def test_a_missing_tensor_is_drawn_as_hugging_face_draws_it_and_named_once(folders: dict[str, Path]) -> None:
    """The lost tensor is a bias, which Hugging Face's OPT sets to zero. Each rank has another seed. It was refused on
    several ranks once, and drawn without a word of ours on one.
    """
    whole = dict(OPTForCausalLM.from_pretrained(folders["missing"]).named_parameters())
    for world_size, stage in ((1, 3), (2, 0), (2, 3)):
        for rank, found in enumerate(run(draw, world_size, folders["missing"], stage)):
            assert [LOST in text and str(folders["missing"]) in text for text in found.said] == [True] * (rank == 0)
            assert found.is_clean
            for name, value in whole.items():
                assert torch.equal(found.values[name], value), name
            assert not found.values[LOST].any()


def test_blocks_nest_and_keep_parameters_on_the_meta_device_that_a_user_puts_there() -> None:
    with construction(ALONE, ALONE):
        with construction(ALONE, ALONE):
            inner = nn.Linear(3, 2)
        with torch.device("meta"):
            meant = nn.Linear(3, 2)
        assert inner.weight.untyped_storage().device.type == "meta"
    assert inner.weight.isfinite().all()
    assert inner.weight.std() > 0
    assert meant.weight.device.type == "meta"


def test_a_state_dict_copied_in_a_block_is_kept() -> None:
    want = nn.Linear(3, 2)
    with construction(ALONE, ALONE):
        copied, assigned = nn.Linear(3, 2), nn.Linear(3, 2)
        copied.load_state_dict(want.state_dict())
        assigned.load_state_dict(want.state_dict(), assign=True)
    for got in (copied, assigned):
        assert torch.equal(got.weight, want.weight)
        assert torch.equal(got.bias, want.bias)
        assert got.weight.data_ptr() != want.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_placeholder_has_a_shape_and_holds_one_element(dtype: torch.dtype) -> None:
    x = placeholder((5, 7), dtype, torch.device("cpu"))
    assert (x.shape, x.numel(), x.untyped_storage().nbytes()) == ((5, 7), 35, dtype.itemsize)
    assert x.isnan().all() or not dtype.is_floating_point
    assert (x + x).shape == x.shape

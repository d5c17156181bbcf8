"""Models of unusual build, in plain torch and under an engine in every stage."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import parallel
from tests.graphs import WIDTH, Stack
from tests.harness import run
from tests.parity import whole
from tests.test_graphs import made, setting_of, share_of
from tests.test_module_engine import engine_of
from tests.test_surgery import launch

RANKS = 2


class Activations(Stack):
    """Entries of a ModuleList without parameters, and a layer that is listed twice."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([shared, nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Identity(), shared])


class Albert(nn.Module):
    """A model of transformers that does not support recomputation of its own."""

    def __new__(cls) -> Any:
        more: Any = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, embedding_size=6, hidden_size=12)
        shape: Any = dict(vocab_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
        return hf.AlbertForMaskedLM(hf.AlbertConfig(**shape, **more))


def loss_of(model: Any, rank: int) -> Tensor:
    if isinstance(getattr(model, "module", model), hf.AlbertForMaskedLM):
        ids = torch.arange(8).view(2, 4) + 9 * rank
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss
    found: Tensor = model(share_of(rank))
    return found


def by_torch(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    module, optimizer = made(make)
    module.double()
    for rank in range(RANKS):
        (loss_of(module, rank) / RANKS).backward()
    optimizer.step()
    return {name: p.detach() for name, p in module.named_parameters()}


CHECKS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "layers without parameters, offloaded": (Activations, setting_of(3, "cpu")),
    "layers without parameters, recomputed": (Activations, setting_of(3, activation_checkpointing="full")),
    "a model without recomputation of its own": (Albert, setting_of(3, activation_checkpointing="full")),
}


def by_engine(rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name, (make, setting) in CHECKS.items():
        module, optimizer = made(make)
        engine, _ = engine_of(rank, world_size, setting, module, optimizer=optimizer)
        engine.backward(loss_of(engine, rank))
        engine.step()
        found[name] = whole(engine, [chunk.master for chunk in engine.chunks])
    return found


@pytest.fixture(scope="module")
def trained() -> dict[str, dict[str, Tensor]]:
    return run(by_engine, RANKS)[0]


@pytest.mark.parametrize("name", CHECKS)
def test_a_model_of_unusual_build_trains_as_in_plain_torch(name: str, trained: dict[str, dict[str, Tensor]]) -> None:
    """A layer without parameters ended a profiled step with a StopIteration, and a model that does not recompute its
    layers itself was refused. All numbers are fp64, in which these small sums differ by a few last bits; cross
    entropies of transformers are computed in fp32.
    """
    tolerance = 1e-7 if "of its own" in name else 1e-11
    for key, weight in by_torch(CHECKS[name][0]).items():
        torch.testing.assert_close(trained[name][key], weight, rtol=tolerance, atol=tolerance, msg=key)


def message_of(act: Callable[[], Any]) -> str:
    try:
        act()
    except parallel.ModelError as error:
        return str(error)
    return ""


def refusals(rank: int, world_size: int, stage: int) -> dict[str, str]:
    """Return what is said of two engines that meet, and of a load after `sharded_init`."""
    launch(rank, world_size, stage)
    first, second = Stack(), Stack()
    engine, *_ = parallel.initialize(first)
    found = {"the same model": message_of(lambda: parallel.initialize(first))}
    second.first = first.first
    found["a shared layer"] = message_of(lambda: parallel.initialize(second))
    other, *_ = parallel.initialize(Stack())
    x = share_of(rank).float()
    found["two engines in one graph"] = message_of(lambda: engine.backward(engine(x) + other(x)))
    found["nothing to train"] = message_of(lambda: parallel.initialize(Stack().requires_grad_(False)))
    with torch.device("meta"):
        empty, buffered = Stack(), Stack()
    buffered = buffered.to_empty(device="cpu")
    buffered.register_buffer("table", torch.empty(2, device="meta"), persistent=False)
    found["parameters on meta"] = message_of(lambda: parallel.initialize(empty))
    found["a buffer on meta"] = message_of(lambda: parallel.initialize(buffered))
    with parallel.sharded_init():
        model = Stack()
    state = Stack().state_dict()
    found["load_state_dict after the block"] = message_of(lambda: model.load_state_dict(state))
    model.load_state_dict(state, assign=True)
    engine, *_ = parallel.initialize(model)
    with engine.full_parameters() as weights:
        assert all(torch.equal(weights[name], x) for name, x in state.items())

    def replace() -> None:
        with engine.full_parameters(writable=True):
            model.load_state_dict(state, assign=True)

    found["parameters replaced"], found["after that"] = message_of(replace), message_of(replace)
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_engines_that_meet_and_loads_into_shards_are_refused_by_name(stage: int) -> None:
    """A second engine took the parameters of the first one without a word; torch made a RuntimeError of the load."""
    words = {
        "the same model": "first.weight has an engine already",
        "a shared layer": "first.weight has an engine already",
        "two engines in one graph": "freeze this one's parameters",
        "nothing to train": "make it a part of the module that is trained",
        "load_state_dict after the block": "first.weight is used after the block" if stage == 3 else "",
        "parameters on meta": "first.weight: it is on the meta device",
        "a buffer on meta": "table: it is on the meta device",
        "parameters replaced": "first.weight is not the parameter it was",
        "after that": "first.weight is not the parameter it was",
    }
    for found in run(refusals, RANKS, stage):
        for name, message in found.items():
            assert words[name] in message, name
            assert bool(words[name]) == bool(message), name


def cast(rank: int, world_size: int, stage: int) -> dict[str, Tensor]:
    """Return the weights of a model that was rounded after `sharded_init`, and the dtype of some was changed back."""
    launch(rank, world_size, stage)
    torch.manual_seed(3)
    with parallel.sharded_init():
        model = Stack()
    model.bfloat16().first.float()
    engine, *_ = parallel.initialize(model)
    with engine.full_parameters() as weights:
        return {name: x.clone() for name, x in weights.items()}


def test_a_cast_after_the_block_rounds_the_weights_in_every_stage() -> None:
    """The shards of stage 3 kept their precision: the stages had different models."""
    whole_ones, shards = (run(cast, RANKS, stage)[0] for stage in (0, 3))
    for name, x in whole_ones.items():
        assert torch.equal(x, x.bfloat16().float()), name
        assert torch.equal(x, shards[name]), name

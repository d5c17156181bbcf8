"""Models of unusual build, in plain torch and under an engine in every stage."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from tests.graphs import WIDTH, Stack
from tests.harness import run
from tests.parity import whole
from tests.test_graphs import made, setting_of, share_of
from tests.test_module_engine import engine_of

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

"""Stage 3 is stage 2 for every graph: a backward that reaches a layer in any way trains as in plain torch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.graphs import CASES, WIDTH, Case
from tests.harness import run
from tests.parity import Raw, whole
from tests.test_module_engine import config_of, engine_of


def batch(world_size: int) -> list[Tensor]:
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return list(x.chunk(world_size))


def made(case: Case) -> nn.Module:
    torch.manual_seed(3)
    return case.make()


def by_torch(case: Case, world_size: int) -> tuple[dict[str, Tensor], float]:
    """Return the weights after a step of plain torch in one process, and the norm of the gradient."""
    module = made(case).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for x in batch(world_size):
        case.loop(module, lambda loss, **more: (loss / world_size).backward(**more), x)
    norm = nn.utils.clip_grad_norm_(module.parameters(), 1e9)
    optimizer.step()
    return {name: p.detach() for name, p in module.named_parameters()}, norm.item()


def by_engine(rank: int, world_size: int, raw: Raw, names: list[str]) -> list[Any]:
    """Return the same of each case by an engine, or its error."""
    found: list[Any] = []
    for name in names:
        module = made(CASES[name])
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        engine, _ = engine_of(rank, world_size, raw, module, optimizer=optimizer)
        try:
            CASES[name].loop(engine, engine.backward, batch(world_size)[rank])
            norm = engine.step().grad_norm
            found.append((whole(engine, [chunk.master for chunk in engine.chunks]), norm))
        except Exception as error:
            import traceback; traceback.print_exc()
            found.append(f"{type(error).__name__}: {error}")
    return found


def setting_of(stage: int, placement: str = "cuda", **train: Any) -> Raw:
    raw = config_of(stage, clip_grad_norm=None, **train)
    return raw | dict(zero=dict(stage=stage, tensor_placement_policy=placement))


SETTINGS: dict[str, Raw] = {
    "stage 3": setting_of(3),
    "stage 3, offloaded": setting_of(3, "cpu"),
    "stage 0, offloaded": setting_of(0, "cpu"),
    "stage 2": setting_of(2),
    "stage 3, recomputed": setting_of(3, activation_checkpointing="full"),
    "stage 2, recomputed": setting_of(2, activation_checkpointing="full"),
    "stage 3, recomputed and offloaded": setting_of(3, activation_checkpointing="offload"),
    "stage 3, auto": setting_of(3, "auto"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_graph_trains_as_in_plain_torch(setting: str) -> None:
    names = list(CASES)
    bad = []
    for name, got in zip(names, run(by_engine, 2, SETTINGS[setting], names)[0], strict=True):
        want = by_torch(CASES[name], 2)
        if isinstance(got, str): bad.append((name, got)); continue
        d = max((got[0][n]-v).abs().max().item() for n,v in want[0].items())
        if not d < CASES[name].bound or not abs(got[1]-want[1])<1e-6: bad.append((name, d, got[1], want[1]))
    for b in bad: print(b)
    assert not bad

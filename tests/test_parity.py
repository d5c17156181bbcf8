"""Every layout trains as Hugging Face's OPT does: losses, norms, gradients and weights of four steps are equal.

Both begin with the same weights and train on the same tokens.
"""

from collections.abc import Container, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run
from tests.parity import (
    BOUND,
    PROJECTED,
    SHAPE,
    Raw,
    Trace,
    batches_of,
    compare,
    config_of,
    reference,
    save_model,
    train,
)


def tensor(mode: str, size: int, **more: Any) -> Raw:
    return dict(mode=mode, size=size, **more)


A2A2 = dict(size=2, kind="all_to_all")
LAYOUTS: dict[str, tuple[int, Raw]] = {  # name: world size, parallel section
    "single": (1, {}),
    "1d2": (2, dict(tensor=tensor("1d", 2))),
    "1d3": (3, dict(tensor=tensor("1d", 3))),
    "1d4": (4, dict(tensor=tensor("1d", 4))),
    "2d4": (4, dict(tensor=tensor("2d", 4))),
    "2d2x3": (6, dict(tensor=tensor("2d", 6, rows=2))),
    "2d4x1": (4, dict(tensor=tensor("2d", 4, rows=4))),
    "2.5d4": (4, dict(tensor=tensor("2.5d", 4))),
    "2.5d8-depth2": (8, dict(tensor=tensor("2.5d", 8, depth=2))),
    "3d8": (8, dict(tensor=tensor("3d", 8))),
    "pp2": (2, dict(pipeline=2)),
    "pp2-gpipe": (2, dict(pipeline=dict(size=2, schedule="gpipe"))),
    "pp4-uneven": (4, dict(pipeline=dict(size=4, layers=[0, 1, 2, 0]))),
    "pp2-1d2": (4, dict(pipeline=2, tensor=tensor("1d", 2))),
    "pp2-2d4": (8, dict(pipeline=2, tensor=tensor("2d", 4))),
    "pp2-2.5d4": (8, dict(pipeline=2, tensor=tensor("2.5d", 4))),
    "dp2": (2, {}),
    "dp2-pp2-1d2": (8, dict(pipeline=2, tensor=tensor("1d", 2))),
    "dp2-2d4": (8, dict(tensor=tensor("2d", 4))),
    "ring3": (3, dict(context=3)),
    "ring3-1d2": (6, dict(context=3, tensor=tensor("1d", 2))),
    "pp2-ring3": (6, dict(pipeline=2, context=3)),
    "a2a2": (2, dict(context=A2A2)),
    "a2a2-2d4": (8, dict(context=A2A2, tensor=tensor("2d", 4))),
    "a2a2-2.5d4-depth2": (8, dict(context=A2A2, tensor=tensor("2.5d", 4, depth=2, rows=1))),
    "dp2-pp2-a2a2": (8, dict(pipeline=2, context=A2A2)),
}
PROJECTED_LAYOUTS = ["single", "1d4", "2d4", "3d8", "pp2-2d4", "ring3"]
IN_FP32 = ("single", "1d2", "2d4", "2.5d8-depth2", "3d8", "pp2", "dp2", "ring3", "a2a2")
"""The layouts of which the others are combinations. The others are slow in fp32."""


def cases(layouts: Iterable[str], in_fp32: Container[str]) -> list[Any]:
    """Return every layout in fp64, where rounding hides no error, and in fp32."""
    wide = [pytest.param(name, "fp64", id=f"{name}-fp64", marks=pytest.mark.gpu) for name in layouts]
    return wide + [
        pytest.param(name, "fp32", id=f"{name}-fp32", marks=pytest.mark.gpu if name in in_fp32 else pytest.mark.slow)
        for name in layouts
    ]


@pytest.fixture(scope="session")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a Hugging Face directory of each shape."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "tied": save_model(folder / "tied", **SHAPE),
        "projected": save_model(folder / "projected", **PROJECTED),
    }


@cache
def wanted(path: Path, precision: str) -> Trace:
    """Return the trace of the reference, which is trained once for all layouts."""
    return reference(path, config_of({}, precision=precision), batches_of(4))


def check(path: Path, layout: str, precision: str, *, micro: int | None = None) -> None:
    """Compare a layout with the reference. By default each replica sums the gradients of three microbatches."""
    world_size, parallel = LAYOUTS[layout]
    micro = micro or (2 if layout.startswith("dp2") else 4)
    raw = config_of(parallel, precision=precision, model=dict(path=str(path)), train=dict(micro_batch_size=micro))
    trace = run(train, world_size, raw, batches_of(4))[0]
    assert trace is not None
    compare(trace, wanted(path, precision), BOUND[precision], is_fp64=precision == "fp64")


@pytest.mark.parametrize(("layout", "precision"), cases(LAYOUTS, IN_FP32))
def test_training_equals_hugging_face(models_of: dict[str, Path], layout: str, precision: str) -> None:
    check(models_of["tied"], layout, precision)


@pytest.mark.parametrize(("layout", "precision"), cases(PROJECTED_LAYOUTS, ["single"]))
def test_projected_embeddings_and_post_layer_norm_equal_hugging_face(
    models_of: dict[str, Path], layout: str, precision: str
) -> None:
    check(models_of["projected"], layout, precision)


@pytest.mark.slow
def test_context_and_3d_on_sixteen_ranks_equal_hugging_face(models_of: dict[str, Path]) -> None:
    raw = dict(context=A2A2, tensor=tensor("3d", 8))
    path = models_of["projected"]
    trace = run(train, 16, config_of(raw, model=dict(path=str(path))), batches_of(4))[0]
    assert trace is not None
    compare(trace, wanted(path, "fp64"), BOUND["fp64"], is_fp64=True)


@pytest.mark.parametrize("micro", [12, 2, 1])
def test_accumulation_equals_one_batch(models_of: dict[str, Path], micro: int) -> None:
    check(models_of["tied"], "single", "fp64", micro=micro)


def test_clipping_is_active_in_these_runs(models_of: dict[str, Path]) -> None:
    assert min(wanted(models_of["tied"], "fp64").norms) > 0.5


def test_the_reference_has_the_padding_token_in_every_batch() -> None:
    assert all(bool((batch["input_ids"] == 1).any()) for batch in batches_of(4))
    assert torch.equal(batches_of(1)[0]["input_ids"], batches_of(4)[0]["input_ids"])

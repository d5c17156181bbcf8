"""Every family trains in every layout as Hugging Face's model: losses, norms, gradients and weights are equal.

Both begin with the same weights and train four steps on the same tokens. OPT has a test of every layout that is not
slow. Of the other families each has some, so that all kinds of layouts meet a family; the rest are slow.
"""

from collections.abc import Container, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import FAMILIES, VARIANTS, saved
from tests.harness import run
from tests.parity import (
    BOUND,
    PROJECTED,
    SHAPE,
    Batch,
    Raw,
    Trace,
    batches_of,
    compare,
    config_of,
    padded,
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
    "1d2-sp": (2, dict(tensor=tensor("1d", 2, sequence_parallel=True))),
    "1d3-sp": (3, dict(tensor=tensor("1d", 3, sequence_parallel=True))),
    "pp2-1d2-sp": (4, dict(pipeline=2, tensor=tensor("1d", 2, sequence_parallel=True))),
    "ring3-1d2-sp": (6, dict(context=3, tensor=tensor("1d", 2, sequence_parallel=True))),
    "a2a3-1d2-sp": (6, dict(context=dict(size=3, kind="all_to_all"), tensor=tensor("1d", 2, sequence_parallel=True))),
    "2d4": (4, dict(tensor=tensor("2d", 4))),
    "2d2x3": (6, dict(tensor=tensor("2d", 6, rows=2))),
    "2d4x1": (4, dict(tensor=tensor("2d", 4, rows=4))),
    "2.5d4": (4, dict(tensor=tensor("2.5d", 4))),
    "2.5d8-depth2": (8, dict(tensor=tensor("2.5d", 8, depth=2))),
    "3d8": (8, dict(tensor=tensor("3d", 8))),
    "pp2": (2, dict(pipeline=2)),
    "pp2-gpipe": (2, dict(pipeline=dict(size=2, schedule="gpipe"))),
    "pp4-uneven": (4, dict(pipeline=dict(size=4, layers=[0, 1, 2, 0]))),
    "pp2-interleaved": (2, dict(pipeline=dict(size=2, schedule="interleaved"))),
    "pp2-zb": (2, dict(pipeline=dict(size=2, schedule="zero_bubble"))),
    "pp2-zbv": (2, dict(pipeline=dict(size=2, schedule="zero_bubble_v"))),
    "pp2-zbv-1d2": (4, dict(pipeline=dict(size=2, schedule="zero_bubble_v"), tensor=tensor("1d", 2))),
    "dp2-pp2-zbv": (4, dict(pipeline=dict(size=2, schedule="zero_bubble_v"))),
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
PROJECTED_LAYOUTS = ["single", "1d4", "1d3-sp", "2d4", "3d8", "pp2-2d4", "ring3"]
IN_FP32 = ("single", "1d2", "pp2", "dp2", "ring3", "a2a2")
"""The layouts of which the others are combinations. The others are slow in fp32; grid and cube in fp32 meet another
family, with both kinds of norms.
"""
COMBINED = (
    *("2.5d4", "pp2-2.5d4", "a2a2-2.5d4-depth2", "dp2-2d4", "dp2-pp2-a2a2"),
    *("1d3", "2d2x3", "2d4x1", "ring3-1d2", "pp2-ring3", "a2a2-2d4"),
    *("1d3-sp", "pp2-1d2-sp", "ring3-1d2-sp", "a2a3-1d2-sp"),
    *("pp2-interleaved", "pp2-zb", "pp2-zbv-1d2", "dp2-pp2-zbv"),
)
"""Layouts that are slow in fp64 too. Depth 1 is the grid of 2d4; the parts of the other combinations meet in no layer.
The next six are those of another family in `DIAGONAL`; tests/test_sequence_parallel.py has some like the four after
them, and the last ones are those of tests/test_schedule_parity.py.
"""


def cases(layouts: Iterable[str], in_fp32: Container[str], slow: Container[str] = ()) -> list[Any]:
    """Return every layout in fp64, where rounding hides no error, and in fp32."""

    def case(name: str, precision: str, *, is_slow: bool) -> Any:
        marks = pytest.mark.slow if is_slow else pytest.mark.gpu
        return pytest.param(name, precision, id=f"{name}-{precision}", marks=marks)

    wide = [case(name, "fp64", is_slow=name in slow) for name in layouts]
    return wide + [case(name, "fp32", is_slow=name not in in_fp32) for name in layouts]


@pytest.fixture(scope="session")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a Hugging Face directory of each shape."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "tied": save_model(folder / "tied", **SHAPE),
        "projected": save_model(folder / "projected", **PROJECTED),
    }


@cache
def wanted(path: Path, precision: str, *, pad: bool = False) -> Trace:
    """Return the trace of the reference, which is trained once for all layouts."""
    return reference(path, config_of({}, precision=precision), batches(pad=pad))


def batches(*, pad: bool) -> list[Batch]:
    """Return the batches of four steps, on demand with samples that are padded at the start or at the end."""
    return padded(batches_of(4)) if pad else batches_of(4)


def check(
    path: Path, layout: str, precision: str, *, micro: int | None = None, pad: bool = False, zero: Raw | None = None
) -> None:
    """Compare a layout with the reference. By default each replica sums the gradients of three microbatches."""
    world_size, parallel = LAYOUTS[layout]
    micro = micro or (2 if layout.startswith("dp2") else 4)
    sections: Raw = dict(model=dict(path=str(path)), train=dict(micro_batch_size=micro), zero=zero or {})
    trace = run(train, world_size, config_of(parallel, precision=precision, **sections), batches(pad=pad))[0]
    assert trace is not None
    compare(trace, wanted(path, precision, pad=pad), BOUND[precision], is_fp64=precision == "fp64")


@pytest.mark.parametrize(("layout", "precision"), cases(LAYOUTS, IN_FP32, COMBINED))
def test_training_equals_hugging_face(models_of: dict[str, Path], layout: str, precision: str) -> None:
    check(models_of["tied"], layout, precision)


@pytest.mark.parametrize(("layout", "precision"), cases(PROJECTED_LAYOUTS, ["single"], ["2d4", "1d3-sp"]))
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


# -- the other families

DIAGONAL: dict[str, tuple[str, ...]] = {
    "llama": ("single-fp64", "2d4-fp32", "3d8-fp64", "ring3-fp64"),
    "mistral": ("single-fp64", "2d2x3-fp64", "pp2-ring3-fp64", "a2a2-fp32"),
    "qwen2": ("single-fp64", "1d4-fp64", "pp4-uneven-fp64"),
    "qwen3": ("single-fp64", "1d3-fp32", "2d4x1-fp64", "3d8-fp32", "ring3-1d2-fp64"),
    "gpt2": ("single-fp64", "2.5d8-depth2-fp32", "a2a2-2d4-fp64", "pp2-1d2-fp64"),
}
"""The layouts of each family whose tests are not slow."""

HEADS_BY_TWO = ("single", "1d2", "2d4", "2.5d8-depth2", "3d8", "pp2-1d2", "dp2", "ring3", "a2a2")
"""Layouts of variants: these split heads by two at most, and some variants have two k, v heads."""


def family_cases(families: Iterable[str], layouts: Iterable[str], precisions: Iterable[str]) -> list[Any]:
    """Return every family in every layout and precision, slow but for the diagonal."""

    def is_quick(name: str, layout: str, precision: str) -> bool:
        return f"{layout}-{precision}" in DIAGONAL.get(name, ("single-fp64",))

    return [
        pytest.param(
            name,
            layout,
            precision,
            id=f"{name}-{layout}-{precision}",
            marks=pytest.mark.gpu if is_quick(name, layout, precision) else pytest.mark.slow,
        )
        for name in families
        for layout in layouts
        for precision in precisions
    ]


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which models of families are saved when a test first needs them."""
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize(("name", "layout", "precision"), family_cases(FAMILIES[1:], LAYOUTS, BOUND))
def test_every_family_trains_in_every_layout_as_hugging_faces(
    families: Path, name: str, layout: str, precision: str
) -> None:
    """fp64 hides nothing; in fp32 the reference itself is 2e-6 from fp64 (tests/test_reference.py)."""
    check(saved(families, name, layout), layout, precision)


@pytest.mark.parametrize(("name", "layout", "precision"), family_cases(VARIANTS, HEADS_BY_TWO, ["fp64"]))
def test_what_else_a_family_can_be_trains_as_hugging_faces(
    families: Path, name: str, layout: str, precision: str
) -> None:
    """Variants: other rotary scalings, biases, windows, head sizes, tied and untied heads, and few k, v heads."""
    check(saved(families, name, layout), layout, precision)


PADDED = {"llama": "2d4", "mistral": "ring3", "qwen2": "pp4-uneven", "qwen3": "1d2", "gpt2": "a2a2"}
"""The layout of each family in which a test of padding is not slow."""


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=pytest.mark.gpu if PADDED[name] == layout else pytest.mark.slow)
        for name in PADDED
        for layout in LAYOUTS
    ],
)
def test_padding_at_the_start_and_at_the_end_is_as_in_hugging_faces(families: Path, name: str, layout: str) -> None:
    """Positions are those of transformers' forward: 0, 1, ... from the first column, also where it is padding."""
    check(saved(families, name, layout), layout, "fp64", pad=True)


@pytest.mark.parametrize("micro", [12, 2, 1])
def test_accumulation_in_a_family_equals_one_batch(families: Path, micro: int) -> None:
    check(saved(families, "llama"), "single", "fp64", micro=micro)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(
            name, layout, marks=[] if (name, layout) in (("qwen3", "dp2"), ("gpt2", "dp2")) else pytest.mark.slow
        )
        for name in FAMILIES[1:]
        for layout in ("dp2", "dp2-pp2-1d2", "dp2-2d4", "ring3")
    ],
)
def test_stage_3_with_offload_trains_a_family_as_hugging_faces(families: Path, name: str, layout: str) -> None:
    """ZeRO stage 3: parameters, gradients and states are divided among replicas, and are resident on the host."""
    zero = dict(stage=3, tensor_placement_policy="cpu")
    check(saved(families, name, layout), layout, "fp64", zero=zero)


def test_clipping_is_active_in_the_runs_of_families(families: Path) -> None:
    for name in FAMILIES:
        assert min(wanted(saved(families, name), "fp64").norms) > 0.5

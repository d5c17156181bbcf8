"""Every schedule of a pipeline trains the same model: as Hugging Face's, and to the last bit as with recomputation.

The model has so many blocks that there are stages for three on a rank. The number of microbatches is no multiple of the
number of ranks, but for one layout.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families import FAMILIES, SHAPES
from tests.harness import run
from tests.parity import BOUND, SHAPE, Raw, Trace, batches_of, compare, config_of, padded, reference, save_model, train


def pipeline(size: int, schedule: str, **more: Any) -> Raw:
    return dict(size=size, schedule=schedule, **more)


@dataclass(frozen=True)
class Layout:
    """A pipeline, with what is split beside its layers, and the number of samples in a microbatch."""

    num_ranks: int
    pipeline: Raw
    more: Raw = field(default_factory=dict)
    micro: int = 4
    zero: Raw = field(default_factory=dict)

    def raw(self, precision: str = "fp64", **sections: Any) -> Raw:
        parallel = dict(pipeline=self.pipeline) | self.more
        sections["train"] = dict(micro_batch_size=self.micro) | sections.get("train", {})
        return config_of(parallel, precision=precision, zero=self.zero, **sections)


TP2, GRID = dict(tensor=dict(mode="1d", size=2)), dict(tensor=dict(mode="2d", size=4))
CUBE, RING = dict(tensor=dict(mode="3d", size=8)), dict(context=3)
LAYOUTS: dict[str, Layout] = {
    "pp3-interleaved3": Layout(3, pipeline(3, "interleaved", chunks=3), micro=3),
    "pp4-interleaved": Layout(4, pipeline(4, "interleaved"), micro=2),
    "pp4-zb": Layout(4, pipeline(4, "zero_bubble"), micro=2),
    "pp3-zbv": Layout(3, pipeline(3, "zero_bubble_v"), micro=1),
    "pp4-zbv": Layout(4, pipeline(4, "zero_bubble_v")),
    "pp2-zbv-uneven": Layout(2, pipeline(2, "zero_bubble_v", layers=[0, 3, 4, 0])),
    "pp3-interleaved-uneven": Layout(3, pipeline(3, "interleaved", layers=[2, 1, 1, 2, 1, 0]), micro=1),
    "pp2-interleaved4": Layout(2, pipeline(2, "interleaved", chunks=4)),
    "pp1-interleaved": Layout(1, pipeline(1, "interleaved")),
    "pp1-zbv": Layout(1, pipeline(1, "zero_bubble_v")),
    "pp2-zbv-1d2": Layout(4, pipeline(2, "zero_bubble_v"), TP2),
    "pp2-zb-ring3": Layout(6, pipeline(2, "zero_bubble"), RING),
    "pp2-interleaved-2d4": Layout(8, pipeline(2, "interleaved"), GRID),
    "pp2-zbv-2d4": Layout(8, pipeline(2, "zero_bubble_v"), GRID),
    "pp1-zb-3d8": Layout(8, pipeline(1, "zero_bubble"), CUBE),
    "dp2-pp2-interleaved-zero1": Layout(4, pipeline(2, "interleaved"), micro=2, zero=dict(stage=1)),
    "dp2-pp2-zbv-zero2": Layout(4, pipeline(2, "zero_bubble_v"), micro=2, zero=dict(stage=2)),
    "dp2-pp2-zbv-zero3": Layout(4, pipeline(2, "zero_bubble_v"), micro=2, zero=dict(stage=3)),
    "dp2-pp2-zb-zero3-host": Layout(
        4, pipeline(2, "zero_bubble"), micro=2, zero=dict(stage=3, tensor_placement_policy="cpu")
    ),
    "dp2-pp2-interleaved-1d2": Layout(8, pipeline(2, "interleaved"), TP2, micro=2),
}
QUICK = ("pp3-interleaved3", "pp3-zbv", "pp2-zbv-uneven", "dp2-pp2-zbv-zero3")
"""Layouts whose tests are not slow: the odd ring, both directions of a V, and weights that are gathered on demand."""


def deep(name: str) -> Raw:
    """Return the tiny shape of a family with seven blocks: with embedding and head there is a layer for nine stages."""
    return SHAPES[name] | {"n_layer" if name == "gpt2" else "num_hidden_layers": 7}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which models are saved when a test first needs them."""
    return tmp_path_factory.mktemp("deep")


def saved(folder: Path, name: str) -> Path:
    path = folder / name
    return path if path.exists() else save_model(path, name, **deep(name))


@cache
def wanted(path: Path, precision: str, *, pad: bool = False) -> Trace:
    """Return the trace of Hugging Face's model, which is trained once for all layouts."""
    batches = padded(batches_of(2)) if pad else batches_of(2)
    return reference(path, config_of({}, steps=2, precision=precision), batches)


def trained(layout: Layout, raw: Raw, *, pad: bool = False) -> Trace:
    batches = padded(batches_of(2)) if pad else batches_of(2)
    trace = run(train, layout.num_ranks, raw, batches)[0]
    assert trace is not None
    return trace


def check(path: Path, name: str, precision: str, *, pad: bool = False) -> None:
    layout = LAYOUTS[name]
    raw = layout.raw(precision, steps=2, model=dict(path=str(path)))
    compare(
        trained(layout, raw, pad=pad), wanted(path, precision, pad=pad), BOUND[precision], is_fp64=precision == "fp64"
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.gpu if name in QUICK else pytest.mark.slow) for name in LAYOUTS]
)
def test_every_schedule_trains_as_hugging_face(models: Path, name: str) -> None:
    check(saved(models, "opt"), name, "fp64")


@pytest.mark.slow
@pytest.mark.parametrize("precision", BOUND)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_every_family_trains_with_every_schedule_as_hugging_face(
    models: Path, family: str, name: str, precision: str
) -> None:
    check(saved(models, family), name, precision)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_padding_with_every_schedule_is_as_in_hugging_face(models: Path, name: str) -> None:
    check(saved(models, "opt"), name, "fp64", pad=True)


DROPPED = SHAPE | dict(num_hidden_layers=4, dropout=0.3, attention_dropout=0.3)
SCHEDULES = {
    "gpipe": Layout(2, pipeline(2, "gpipe")),
    "1f1b": Layout(2, pipeline(2, "1f1b")),
    "interleaved": Layout(2, pipeline(2, "interleaved")),
    "zero_bubble": Layout(2, pipeline(2, "zero_bubble")),
    "zero_bubble_v": Layout(2, pipeline(2, "zero_bubble_v")),
    "zero_bubble_v, ZeRO 3": LAYOUTS["dp2-pp2-zbv-zero3"],
    "zero_bubble, 1d": Layout(4, pipeline(2, "zero_bubble"), TP2),
    "zero_bubble, 2d": Layout(8, pipeline(2, "zero_bubble"), GRID),
    "interleaved, ring": Layout(6, pipeline(2, "interleaved"), RING),
}


def with_dropout(layout: Layout, precision: str = "fp32", **options: Any) -> Trace:
    """Return the trace of two steps with dropout, from weights that the seed gives."""
    return trained(layout, layout.raw(precision, steps=2, model=DROPPED, train=options))


def assert_same_bits(got: Trace, want: Trace) -> None:
    assert (got.losses, got.norms) == (want.losses, want.norms)
    for name, weight in want.weights.items():
        assert torch.equal(got.weights[name], weight), name


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=[] if (name, how) == ("zero_bubble_v", "full") else pytest.mark.slow)
        for name in SCHEDULES
        for how in ("full", "offload")
    ],
)
def test_recomputation_changes_no_bit_in_any_schedule(name: str, how: str) -> None:
    layout = SCHEDULES[name]
    assert_same_bits(with_dropout(layout, activation_checkpointing=how), with_dropout(layout))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["zero_bubble", pytest.param("gpipe", marks=pytest.mark.slow)])
def test_a_schedule_sums_gradients_in_the_order_of_microbatches(name: str) -> None:
    """The bits are those of 1F1B if stages have the same layers. With other layers a norm is rounded in other parts."""
    layout, one_f_one_b = (Layout(2, pipeline(2, each, layers=[2, 2])) for each in (name, "1f1b"))
    assert_same_bits(with_dropout(layout), with_dropout(one_f_one_b))

"""train.compile changes no result, to the rounding of the arithmetic."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.chunk.accumulator import Accumulator
from parallel.config import parse
from parallel.errors import ConfigError
from parallel.ops.kernels import table
from tests.harness import run
from tests.parity import SHAPE, Raw, Trace, batches_of, compare, config_of, engine_of, share_of, train
from tests.patience import LIMIT
from training import preflight

LAYOUTS: dict[str, tuple[int, Raw]] = {
    "dp2-pp2": (4, dict(pipeline=2)),
    "dp2-pp2-zbv": (4, dict(pipeline=dict(size=2, schedule="zero_bubble_v"))),
    "1d2": (2, dict(tensor=dict(mode="1d", size=2))),
    "1d2-sp": (2, dict(tensor=dict(mode="1d", size=2, sequence_parallel=True))),
    "2d4": (4, dict(tensor=dict(mode="2d", size=4))),
    "2.5d4": (4, dict(tensor=dict(mode="2.5d", size=4, depth=2, rows=2))),
    "3d8": (8, dict(tensor=dict(mode="3d", size=8))),
    "ring3": (3, dict(context=3)),
    "a2a2-1d2": (4, dict(context=dict(size=2, kind="all_to_all"), tensor=dict(mode="1d", size=2))),
}


def check_compiler() -> None:
    """Skip the test where torch's compiler cannot be used."""
    try:
        preflight.check_compiler(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except ConfigError as error:
        pytest.skip(str(error))


def check(world_size: int, parallel: Raw, *, zero: Raw | None = None, **options: Any) -> None:
    """Compare a compiled run with an eager one; `zero` is that section of both configs, `options` those of `train`.

    Compiled code sums in another order. The bound, and Adam's eps, are those of the randomly drawn layouts
    (tests/test_property.py).
    """
    check_compiler()

    def trace(compiles: bool) -> Trace:
        model = SHAPE | dict(num_hidden_layers=2, dropout=0.3, attention_dropout=0.3)
        micro = dict(micro_batch_size=2 if "pipeline" in parallel else 4)
        section = micro | options | dict(compile=compiles)
        sections: Raw = dict(model=model, train=section, optimizer=dict(eps=1e-3)) | (dict(zero=zero) if zero else {})
        raw = config_of(parallel, steps=2, **sections)
        found = run(train, world_size, raw, batches_of(2), timeout=3 * LIMIT)[0]
        assert found is not None
        return found

    compare(trace(True), trace(False), 1e-12, is_fp64=False)


@pytest.mark.gpu
def test_compiled_with_dropout_equals_eager() -> None:
    check(1, {})


@pytest.mark.slow
@pytest.mark.timeout(2 * 1800)
@pytest.mark.parametrize("checkpointing", ["none", "full", "offload"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_equals_eager_in_every_mode(layout: str, checkpointing: str) -> None:
    check(*LAYOUTS[layout], activation_checkpointing=checkpointing)


@pytest.mark.slow
@pytest.mark.timeout(2 * 1800)
@pytest.mark.parametrize(
    "zero",
    [dict(stage=2), dict(stage=3), dict(tensor_placement_policy="cpu"), dict(stage=3, tensor_placement_policy="cpu")],
    ids=str,
)
def test_compiled_equals_eager_in_every_stage_of_zero(zero: Raw) -> None:
    """Each rank has a single microbatch, whose gradients compiled code may place where they are summed."""
    check(2, {}, zero=zero, micro_batch_size=6)


@pytest.fixture
def looks_again() -> Iterator[None]:
    """Have the table of kernels look anew for what this machine has, in the test and after it."""
    table.what_triton_lacks.cache_clear()
    yield
    table.what_triton_lacks.cache_clear()


@pytest.mark.usefixtures("looks_again")
def test_a_host_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    for device, missing in (("cpu", r"a C\+\+ compiler, such as g\+\+"), ("cuda", "Triton")):
        with pytest.raises(ConfigError, match=rf"train\.compile: True needs {missing}.*Try False\."):
            preflight.check_compiler(torch.device(device))


@pytest.mark.usefixtures("looks_again")
@pytest.mark.parametrize("lacks", ["Triton", "a C compiler", "Python's headers"])
def test_a_gpu_on_whose_host_kernels_cannot_be_built_is_reported(lacks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own kernels take their place, and nothing said why steps were slower."""
    config = parse({"train": {"device": "cuda", "precision": "bf16"}})
    monkeypatch.setattr(table, "find_spec", lambda name: None if lacks == "Triton" else name)
    monkeypatch.setattr("shutil.which", lambda name: None if lacks == "a C compiler" else name)
    monkeypatch.setattr(table, "_header", lambda: Path("/nowhere") if lacks == "Python's headers" else Path(__file__))
    (message,) = preflight.kernel_messages(config)
    assert f"need {lacks}" in message
    assert not preflight.kernel_messages(replace(config, train=replace(config.train, device="cpu")))


def copied_matrices(rank: int, world_size: int, raw: Raw) -> tuple[set[str], int]:
    """Train a step, and return the matrices whose gradients were copied, and the number of breaks in compiled code."""
    engine = engine_of(rank, world_size, raw)
    matrices = {info: name for name, info in ((x.name, x) for x in engine.part.infos) if not name.endswith(".bias")}
    copied = set()
    add = Accumulator.add

    def record(accumulator: Accumulator, i: int, gradient: Tensor) -> None:
        info = accumulator.spec.infos[i]
        if info in matrices and gradient.ndim > 1 and gradient.data_ptr() != accumulator.views()[i].data_ptr():
            copied.add(info.name)
        add(accumulator, i, gradient)

    Accumulator.add = record  # type: ignore[method-assign, assignment]  # this is a process of its own
    engine.train_step(share_of(batches_of(1)[0], engine))
    return copied, len(torch._dynamo.utils.counters["graph_break"])


@pytest.mark.slow
@pytest.mark.gpu
def test_compiled_code_computes_the_gradients_of_weights_where_they_are_summed() -> None:
    """Only the embeddings' gradients are copied, of all matrices, and dropout does not cut the code in two."""
    check_compiler()
    model = SHAPE | dict(num_hidden_layers=2, dropout=0.3)
    raw = config_of({}, steps=1, model=model, train=dict(micro_batch_size=12, compile=True, precision="bf16"))
    copied, num_breaks = run(copied_matrices, 1, raw, timeout=3 * LIMIT)[0]
    assert copied == {"embed.table.weight", "embed.positions.weight"}
    assert not num_breaks

"""The scales of 8-bit linears: what a step leaves of the maxima that it has seen."""

import math
from collections import deque

import pytest
import torch
from torch import Tensor

from parallel.config import parse
from parallel.engine.context import Place, make_context
from parallel.engine.device import check_precision
from parallel.errors import ConfigError
from parallel.mesh.mesh import Axis
from parallel.tensor.scaling import WINDOW, LinearScales, Scaling, ScalingState, is_history
from tests.harness import run

NAMES = [("a.q.weight", "a.k.weight"), ("a.out.weight",)]
CPU = torch.device("cpu")
FINE, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def expected(largest: float, bound: float) -> float:
    """Return the largest power of 2 by which `largest` stays within half of `bound`, found by trying."""
    if not largest:
        return 1.0
    return 2.0 ** max(k for k in range(-100, 100) if largest * 2.0**k <= bound / 2)


def seen(scales: LinearScales, values: tuple[float, float, float]) -> None:
    """Record these magnitudes of x, weight and dy, as a product does."""
    for of_tensor, value in zip((scales.x, scales.weight, scales.dy), values, strict=True):
        of_tensor.amax.copy_(torch.maximum(of_tensor.amax, torch.tensor(value)))


def one_step(scaling: Scaling, *values: tuple[float, float, float], left_out: bool = False) -> None:
    with scaling.casting(records=True):
        for scales, some in zip(scaling.linears, values, strict=True):
            seen(scales, some)
    scaling.end_step(SKIPPED if left_out else FINE)
    scaling.take_outcome(is_updated=not left_out)


def test_a_scale_is_made_of_the_largest_magnitude_of_a_window_of_steps() -> None:
    """Scales are compared with a deque of the last steps and a search over powers of 2, for 3 · WINDOW steps."""
    scaling, last = Scaling(NAMES, [], CPU), deque[list[float]](maxlen=WINDOW)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3 * WINDOW):
        x, weight, dy = (2.0 ** (20 * torch.rand(3, generator=draw) - 10)).tolist()
        one_step(scaling, (x, weight, dy), (0.0, 0.0, 0.0))
        last.append([x, weight, dy])
        most = [max(some) for some in zip(*last, strict=True)]
        wanted = [expected(value, bound) for value, bound in zip(most, (448, 448, 57344), strict=True)]
        found = scaling.linears[0]
        assert [s.scale.item() for s in (found.x, found.weight, found.dy)] == wanted
        assert [s.inverse.item() for s in (found.x, found.weight, found.dy)] == [1 / scale for scale in wanted]
        assert scaling.linears[1].x.scale.item() == 1.0


def test_a_step_that_is_left_out_leaves_history_and_scales_as_they_were() -> None:
    scaling = Scaling(NAMES, [], CPU)
    one_step(scaling, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), left_out=True)
    assert scaling.state == ScalingState(is_known=False)
    assert not scaling.history.any()
    one_step(scaling, (3.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    before = scaling.history.clone(), scaling.scales.clone()
    one_step(scaling, (900.0, math.nan, math.inf), (1.0, 1.0, 1.0), left_out=True)
    assert scaling.state.is_known
    assert torch.equal(scaling.history, before[0])
    assert torch.equal(scaling.scales, before[1])
    one_step(scaling, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    assert scaling.history[-2:, 0, 0].tolist() == [3.0, 1.0], "a maximum of the step that was left out is kept"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_maximum_that_is_not_finite_is_replaced_by_that_of_the_window(bad: float) -> None:
    scaling = Scaling(NAMES, [], CPU)
    one_step(scaling, (3.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    one_step(scaling, (bad, 2.0, 1.0), (1.0, 1.0, 1.0))
    assert scaling.history[-1, 0].tolist() == [3.0, 2.0, 1.0]


def test_maxima_of_an_interrupted_step_are_not_those_of_the_next() -> None:
    scaling = Scaling(NAMES, [], CPU)

    def interrupted() -> None:
        with scaling.casting(records=True):
            seen(scaling.linears[0], (100.0, 1.0, 1.0))
            raise MemoryError

    with pytest.raises(MemoryError):
        interrupted()
    assert not scaling.state.records
    one_step(scaling, (1.0, 1.0, 1.0), (1.0, 1.0, 1.0))
    assert scaling.history[-1, 0].tolist() == [1.0, 1.0, 1.0]


def combined(rank: int, world_size: int, raw: dict[str, object]) -> tuple[Tensor, Tensor]:
    """Return history and scales after a step in which each rank has seen other maxima, one of them a NaN."""
    mesh = make_context(parse(raw, world_size=world_size), Place(rank, world_size, rank, world_size)).mesh
    axes: list[Axis] = [mesh.axis(name) for name in mesh.topology.shape if name != "pipe"]
    scaling = Scaling(NAMES, axes, CPU)
    one_step(scaling, (1.0 + rank, 2.0, 8.0 - rank), (1.0, 1.0, 1.0))
    last = math.nan if rank == world_size - 1 else 5.0
    one_step(scaling, (last, 2.0 + rank, 1.0), (0.0, 0.0, 0.0))
    return scaling.history, scaling.scales


def test_maxima_are_those_of_all_ranks_that_hold_a_part() -> None:
    """Four ranks, data × t: the maximum over both axes is that of a list; a NaN of the last rank is not lost."""
    found = run(combined, 4, dict(parallel=dict(tensor=dict(mode="1d", size=2)), train=dict(global_batch_size=4)))
    for history, scales in found:
        assert history[-2, 0].tolist() == [4.0, 2.0, 8.0]
        assert history[-1, 0].tolist() == [4.0, 5.0, 1.0], "the maximum of x was not finite: that of the window stays"
        assert torch.equal(scales, found[0][1])


def test_a_history_comes_back_by_public_names() -> None:
    scaling = Scaling(NAMES, [], CPU)
    assert scaling.histories() == {}, "nothing is known yet"
    for k in range(1, 5):
        one_step(scaling, (float(k), 1.0, 1.0), (0.5, 1.0, 2.0**k))
    saved = scaling.histories()
    assert sorted(saved) == ["a.k.weight", "a.out.weight", "a.q.weight"]
    assert is_history(saved)
    other = Scaling(NAMES[::-1], [], CPU)  # another stage may have them in another order
    other.restore(saved)
    assert other.state == ScalingState(is_known=True)
    assert torch.equal(other.history.flip(1), scaling.history)
    assert torch.equal(other.scales.flip(0), scaling.scales)
    other.restore({})
    assert other.state == ScalingState()
    assert (other.scales == 1).all()


@pytest.mark.parametrize("value", [{"a": 1}, {"a": torch.ones(3)}, {"a": torch.full((WINDOW, 3), math.nan)}, [1], None])
def test_what_is_no_history_is_recognized(value: object) -> None:
    assert not is_history(value)


def test_copies_of_weights_last_for_a_step_or_an_evaluation_and_only_a_step_records() -> None:
    class Copy:
        cleared = 0

        def clear(self) -> None:
            self.cleared += 1

    scaling, copy = Scaling(NAMES, [], CPU), Copy()
    scaling.copies.append(copy)
    for number, records in enumerate((True, False)):
        with scaling.casting(records=records):
            assert copy.cleared == 2 * number + 1, "somebody may have written into the weight before"
            assert scaling.state.records is records
        assert copy.cleared == 2 * number + 2
        assert scaling.state == ScalingState()


@pytest.mark.parametrize(("capability", "is_refused"), [((8, 6), True), ((8, 9), False), ((9, 0), False)])
def test_a_gpu_without_8_bit_products_is_refused_by_name(
    capability: tuple[int, int], is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    device = torch.device("cuda", 1)
    check_precision("bf16", device)
    check_precision("fp8", CPU)
    if not is_refused:
        check_precision("fp8", device)
        return
    with pytest.raises(ConfigError) as refused:
        check_precision("fp8", device)
    assert str(refused.value) == (
        "train.precision: 'fp8' needs a GPU of compute capability 8.9 or higher (Ada, Hopper, Blackwell), and cuda:1"
        " is NVIDIA A10, of 8.6. Try 'bf16'."
    )

"""LayerNorm and RMSNorm equal torch's over a dim that is split, and over the heads that ranks divide among them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod

import pytest
import torch
from torch import Tensor, nn

from parallel.chunk.chunk import Chunk
from parallel.chunk.spec import specs_of
from parallel.layout.layout import ParameterInfo
from parallel.layout.sources import whole as whole_source
from parallel.mesh.mesh import Axis, Mesh
from parallel.mesh.topology import Topology
from parallel.optim.grad_norm import global_norm
from parallel.optim.gradients import Gradients
from parallel.tensor import MODES, Mode
from tests.accounts import RecordedCalls, bytes_kept, part, saved_for_backward, summed, value
from tests.harness import run
from tests.parity import relative
from tests.test_traffic import WAYS, formulas

BOUND = 1e-12  # relative, in fp64: some hundreds of roundings
EPS = 0.3  # so large that it matters where it is added
B, S, H, HEADS, D = 8, 3, 16, 4, 6

LAYOUTS: dict[str, tuple[str, Mapping[str, int]]] = {  # name: (mode, the sizes of data and of the mode's axes)
    "1d2": ("1d", dict(t=2)),
    "dp2-1d2": ("1d", dict(data=2, t=2)),
    "2d2x1": ("2d", dict(row=2)),
    "2d1x2": ("2d", dict(col=2)),
    "2d2x2": ("2d", dict(row=2, col=2)),
    "2.5d-depth2": ("2.5d", dict(depth=2)),
    "3d2x2x2": ("3d", dict(i=2, w=2, o=2)),
}
KINDS: dict[str, type[nn.LayerNorm] | type[nn.RMSNorm]] = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}


@dataclass(frozen=True)
class Account:
    """The measurements of one rank."""

    errors: dict[str, float] = field(default_factory=dict)
    """The relative differences to torch, by the name of what is compared."""

    rounding: dict[str, tuple[float, float]] = field(default_factory=dict)
    """The errors in bf16, ours and torch's, by the name of what is compared."""

    sent: dict[str, list[float]] = field(default_factory=dict)
    """The elements that are sent forward and backward, by kind."""

    kept: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The bytes kept for backward besides x, and the number of rows, by kind."""


@cache
def accounts(layout: str) -> list[Account]:
    """Return the measurements of every rank. The ranks are started once for all tests of a layout."""
    mode, sizes = LAYOUTS[layout]
    return run(account, prod(sizes.values()), mode, sizes)


def account(rank: int, world_size: int, name: str, sizes: Mapping[str, int]) -> Account:
    found = Account()
    mode = mode_of(rank, name, sizes, torch.float64)
    for kind in KINDS:
        compare_norms(kind, mode, found)
        compare_norms(kind, mode_of(rank, name, sizes, torch.bfloat16), found)
    for stage in range(3):
        compare_head_norms(mode, stage, found)
    return found


def mode_of(rank: int, name: str, sizes: Mapping[str, int], dtype: torch.dtype, *, connect: bool = True) -> Mode:
    kind = MODES[name]
    shape = dict.fromkeys(("pipe", "data", "context", *kind.axes), 1) | dict(sizes)
    return kind(Mesh(Topology(shape), rank, merged=kind.merged_axes(), connect=connect), dtype)


def drawn(*shape: int, seed: int) -> Tensor:
    """Return fp64 numbers that bf16 has too, so that both dtypes begin with the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double() + 1


# -- over the hidden dim -----------------------------------------------------------------------------------------------


def torch_norm(kind: str, dtype: torch.dtype, x: Tensor, dy: Tensor, size: int) -> dict[str, Tensor]:
    """Return torch's y, dx and the gradients of its parameters, which are drawn, over a last dim of this size."""
    norm = KINDS[kind](size, eps=EPS).to(dtype)
    for seed, parameter in enumerate(norm.parameters()):
        parameter.data.copy_(drawn(size, seed=seed))
    x = x.to(dtype, copy=True).requires_grad_()
    y = norm(x)
    y.backward(dy.to(dtype))
    assert x.grad is not None
    gradients = {
        f"d{name}": parameter.grad for name, parameter in norm.named_parameters() if parameter.grad is not None
    }
    return {"y": y.detach(), "dx": x.grad, **gradients}


def compare_norms(kind: str, mode: Mode, found: Account) -> None:
    """Compare a split norm with torch's: in fp64 each number, in bf16 the error."""
    whole, dy = drawn(B, S, H, seed=2), drawn(B, S, H, seed=3)
    norm = mode.norm(kind, H, eps=EPS)
    between: tuple[tuple[Axis, ...], ...] = (mode.mesh.axis("data"), *mode.batch), (), mode.hidden
    for seed, parameter in enumerate(norm.parameters()):
        parameter.data.copy_(part(drawn(H, seed=seed), mode.hidden))
    x = part(whole, *between).to(mode.dtype).requires_grad_()
    with RecordedCalls("forward") as calls:
        with saved_for_backward() as saved:
            y = norm(x)
        calls.enter("backward")
        y.backward(part(dy, *between).to(mode.dtype))
    assert x.grad is not None
    ours = {"y": y.detach(), "dx": x.grad}
    ours |= {f"d{name}": summed(p, norm.layouts[name]) for name, p in norm.named_parameters()}
    exact, theirs = (torch_norm(kind, dtype, whole, dy, H) for dtype in (torch.float64, mode.dtype))
    for name, got in ours.items():
        split = between if got.ndim == 3 else (mode.hidden,)
        want = part(exact[name], *split)
        if mode.dtype == torch.float64:
            found.errors[f"{kind} {name}"] = relative(got, want)
        else:
            error, allowed = ((x.double() - want).norm() for x in (got, part(theirs[name], *split)))
            found.rounding[f"{kind} {name}"] = float(error), float(allowed)
    if mode.dtype == torch.bfloat16:
        found.sent[kind] = [sum(call.sent for call in calls.calls if call.part == way) for way in WAYS]
        found.kept[kind] = bytes_kept(saved, norm) - x.nbytes, x[..., 0].numel()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_norm_equals_torch(layout: str) -> None:
    for found in accounts(layout):
        assert {name: error for name, error in found.errors.items() if error > BOUND} == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_error_of_a_split_norm_in_bf16_is_at_most_twice_torchs(layout: str) -> None:
    for found in accounts(layout):
        assert {name: pair for name, pair in found.rounding.items() if pair[0] > 2 * pair[1]} == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_norm_keeps_its_statistics_and_sends_what_the_table_says(layout: str) -> None:
    mode, sizes = LAYOUTS[layout]
    row = "2d, 2.5d" if mode in ("2d", "2.5d") else mode
    letters = dict(T=B * S, p=prod(sizes.values()), c=sizes.get("col", 1), q=sizes.get("w", 1))
    for found in accounts(layout):
        for kind, name, numbers in (("layer_norm", "a LayerNorm", 2), ("rms_norm", "an RMSNorm", 1)):
            kept, rows = found.kept[kind]
            assert found.sent[kind] == [value(formula, letters) for formula in formulas(row, name)]
            if kind == "rms_norm" or sizes.keys() & {"col", "o"}:
                assert kept == numbers * rows * torch.float32.itemsize


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_on_one_rank_equals_torch_and_keeps_one_number_a_row(dtype: torch.dtype) -> None:
    """torch's own function keeps three tensors as large as x on a CPU, in fp32. One rounding of `dtype` may differ."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mode = Mode(Mesh(Topology(dict(pipe=1, data=1, context=1)), 0, device=device), dtype)
    norm, theirs = mode.norm("rms_norm", H, eps=EPS), nn.RMSNorm(H, eps=EPS, device=device, dtype=dtype)
    for parameter in (*norm.parameters(), *theirs.parameters()):
        parameter.data.copy_(drawn(H, seed=0))
    x = drawn(B, S, H, seed=2).to(device, dtype).requires_grad_()
    with saved_for_backward() as saved:
        y = norm(x)
    assert relative(y.detach(), theirs(x).detach()) <= torch.finfo(dtype).eps
    assert bytes_kept(saved, norm) == x.nbytes + B * S * torch.float32.itemsize


@pytest.mark.slow
def test_a_norm_that_communicates_nothing_is_compiled_without_a_break() -> None:
    """`fullgraph` raises an error where compiled code ends."""
    norm = Mode(Mesh(Topology(dict(pipe=1, data=1, context=1)), 0), torch.float64).norm("rms_norm", H, eps=EPS)
    x = drawn(B, S, H, seed=2)
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    assert relative(compiled(x).detach(), norm(x).detach()) <= BOUND


@pytest.mark.parametrize("kind", KINDS)
def test_a_norm_may_have_no_parameters(kind: str) -> None:
    norm = Mode(Mesh(Topology(dict(pipe=1, data=1, context=1)), 0), torch.float64).norm(kind, H, eps=EPS, affine=False)
    x = drawn(B, S, H, seed=2)
    assert not list(norm.parameters())
    assert relative(norm(x), KINDS[kind](H, eps=EPS, elementwise_affine=False)(x)) <= BOUND


# -- over each head ----------------------------------------------------------------------------------------------------


def compare_head_norms(mode: Mode, stage: int, found: Account) -> None:
    """Compare a head norm, and the gradient and norm that a ZeRO stage gets, with torch's on a single process."""
    whole, dy = drawn(B, HEADS, S, D, seed=4), drawn(B, HEADS, S, D, seed=5)
    norm = mode.head_norm("rms_norm", D, eps=EPS)
    (weight,) = norm.parameters()
    weight.data.copy_(drawn(D, seed=0))
    info = ParameterInfo(
        "block.q_norm.weight", "block", weight, norm.layouts["weight"], whole_source("q_norm.weight", (D,))
    )
    (spec,) = specs_of([info], torch.float64, zero=stage)
    chunk = Chunk(spec)
    gradients = Gradients([chunk], scatters_each=stage >= 2)
    gradients.begin(1)
    inside = (mode.mesh.axis("data"), *mode.inner_batch), mode.inner_hidden
    q = part(whole, *inside).requires_grad_()
    y = norm(q)
    y.backward(part(dy, *inside))
    gradients.finish()
    want = torch_norm("rms_norm", torch.float64, whole, dy, D)
    dweight = torch.zeros(spec.size, dtype=torch.float64)
    dweight[:D] = want["dweight"]
    assert q.grad is not None
    assert chunk.gradient.total is not None
    length = global_norm([chunk], mode.mesh.world)
    found.errors[f"head norm's y, stage {stage}"] = relative(y.detach(), part(want["y"], *inside))
    found.errors[f"head norm's dx, stage {stage}"] = relative(q.grad, part(want["dx"], *inside))
    got, wanted = chunk.gradient.total, spec.own_slice(dweight)
    found.errors[f"head norm's dweight, stage {stage}"] = float((got - wanted).abs().max() / dweight.abs().max())
    found.errors[f"the norm of head norm's dweight, stage {stage}"] = relative(length, dweight.norm())


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", ["1d", "1d, sequence parallel", "2d", "2.5d", "3d"])
def test_a_head_norms_gradient_is_summed_over_all_ranks_of_a_stage_in_groups_that_the_mesh_has(
    name: str, *, swapped: bool
) -> None:
    """No axis has all ranks of a stage where there is a pipeline: a mesh with other parameters' groups must do."""
    sizes = dict(pipe=2, data=2, context=2) | dict.fromkeys(MODES[name].axes, 2)
    mode = mode_of(0, name, sizes, torch.float64, connect=False)
    mode = mode.blocks_mode() if swapped else mode
    layout = mode.head_norm("rms_norm", D, eps=EPS).layouts["weight"]
    names = [part for axis in layout.sync for part in axis.name.split("+")]
    assert sorted(names) == sorted(sizes.keys() - {"pipe"})
    assert [axis.name for axis in layout.sync[1:]] == [axis.name for axis in mode.inner_hidden]
    assert layout.copies == ()

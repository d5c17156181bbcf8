"""An update by the kernel: as exact as torch's, and moments in bf16 that are rounded with the very same noise."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from parallel.config import OptimizerConfig
from parallel.layout import sources
from parallel.ops.kernels.adamw import update_in_torch
from parallel.ops.kernels.adamw_triton import LARGE, launch_update
from parallel.ops.kernels.elements import Elements, Step
from parallel.optim.rounding import NoiseOfParts, Rounding
from tests.exactness import assert_as_exact
from tests.parts import chunk_of_sources, part_of

CONFIG = OptimizerConfig()
SIZES = (0, 1, 64, 1000, 3333)
WIDE, NARROW = torch.float32, torch.bfloat16


def step_of(device: str, found_inf: float = 0.0) -> Step:
    return Step(torch.tensor(0.3, dtype=torch.float64, device=device), torch.tensor(found_inf, device=device), 1e-3)


def elements_of(size: int, dtypes: tuple[torch.dtype, torch.dtype | None], device: str, *, first: int = 0) -> Elements:
    """Return elements with a gradient and parameters of these dtypes, from index `first` of larger tensors on."""
    generator = torch.Generator().manual_seed(size)
    gradient, w, m, v = (torch.randn(first + size, generator=generator) for _ in range(4))
    gradient *= 10.0 ** torch.randint(-6, 4, (len(gradient),), generator=generator)
    own = None if dtypes[1] is None else torch.full((first + size,), torch.nan, device=device, dtype=dtypes[1])[first:]
    states = tuple(x.to(device)[first:] for x in (0.02 * w, 0.1 * m, 1e-2 * v.square()))
    return Elements(gradient.to(device, dtypes[0])[first:], (states[0], states[1], states[2]), own, 1 + size % 5, 0.1)


def cases(device: str) -> Iterator[tuple[str, list[Elements]]]:
    """Yield elements that are updated by one call."""
    for dtypes in ((NARROW, NARROW), (torch.float16, torch.float16), (WIDE, NARROW), (WIDE, None)):
        name = " and ".join(map(str, dtypes))
        many = [elements_of(size, dtypes, device) for size in SIZES]
        yield name, many
        yield f"{name}, alone", many[-1:]
        yield f"{name}, from an odd element on", [elements_of(1000, dtypes, device, first=1)]
    huge = elements_of(1000, (WIDE, None), device)
    yield "huge", [replace(huge, gradient=torch.full_like(huge.gradient, 1e19)), huge]
    yield "two kinds", [elements_of(100, (NARROW, NARROW), device), elements_of(100, (WIDE, None), device)]
    if device != "cpu":
        yield "large and small", [elements_of(size, (NARROW, NARROW), device) for size in (LARGE, 3 * LARGE + 5, 7, 70)]


def copy_of(one: Elements) -> Elements:
    first, second, third = (x.clone() for x in one.states)
    own = None if one.own is None else one.own.clone()
    return replace(one, gradient=one.gradient.clone(), states=(first, second, third), own=own)


def exactly(one: Elements, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states after the update, in fp64; the gradient is multiplied by the factor in fp32, as in torch."""
    (w, m, v), (beta_1, beta_2) = (x.double() for x in one.states), CONFIG.betas
    g = (one.gradient.float() * step.factor.float()).double()
    m, v = beta_1 * m + (1 - beta_1) * g, beta_2 * v + (1 - beta_2) * g**2
    root = (v / (1 - beta_2**one.updates)).sqrt()
    w = w - step.lr * one.decay * w - step.lr / (1 - beta_1**one.updates) * m / (root + CONFIG.eps)
    return w, m, v


def check_exactness(device: str) -> None:
    for name, many in cases(device):
        step = step_of(device)
        exact = [exactly(one, step) for one in many]
        by_torch, found, alone = ([copy_of(one) for one in many] for _ in range(3))
        launch_update(found, step, CONFIG)
        for i, one in enumerate(many):
            update_in_torch(by_torch[i], step, CONFIG)
            launch_update(alone[i : i + 1], step, CONFIG)
            what = f"{name}: {len(one.gradient)}"
            assert torch.equal(found[i].gradient, one.gradient), what
            for kind, got, reference, wanted in zip("wmv", found[i].states, by_torch[i].states, exact[i], strict=True):
                assert_as_exact(got, reference, wanted, f"{what} {kind}")
            for got, same in zip(found[i].states, alone[i].states, strict=True):
                assert torch.equal(got, same), f"{what}: not the same bits alone"
            if one.own is not None:
                own, of_torch = found[i].own, by_torch[i].own
                assert own is not None
                assert of_torch is not None
                assert_as_exact(own, of_torch, exact[i][0], f"{what} parameters")


def check_that_a_step_is_left_out(device: str) -> None:
    many = [elements_of(size, (WIDE, NARROW), device) for size in (64, 1000)]
    for one in many:
        one.gradient[5] = torch.nan
    for together in (many, many[1:]):
        found = [copy_of(one) for one in together]
        launch_update(found, step_of(device, 1.0), CONFIG)
        for got, one in zip(found, together, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got.states, one.states, strict=True))
            assert got.own is not None
            assert got.own.isnan().all()


def check_noise(device: str) -> None:
    """Rows longer than a block, than the smallest block, and shorter; vectors, a transposed matrix and interleaved
    rows, cut inside of rows. Pieces are updated together and, of every other part, one by one.
    """
    shapes = (3, 1500), (20, 300), (24, 40), (7,), (), (2, 16)
    of = [sources.whole(f"a.{i}", shape) for i, shape in enumerate(shapes)]
    of.append(sources.grouped(["q", "k", "v"], [(24, 9), (8, 9), (8, 9)], 4))
    of.append(sources.transposed(sources.joined("c_attn", sources.fused(["q", "k", "v"], (6, 11)))))
    chunk = chunk_of_sources(*of, device=device)
    part = part_of(chunk)
    for flat in (part.gradient, *part.states):
        for segment in chunk.spec.segments(flat):
            segment.data.copy_(
                torch.rand(len(segment.data), generator=torch.Generator().manual_seed(flat.element_size()))
            )
    noise, step = NoiseOfParts(chunk.memory.device), step_of(device)
    want, got = ([x.clone() for x in part.states] for _ in range(2))
    wide = Elements(part.gradient, (want[0], want[1].float(), want[2].float()), None, 3, 0.1)
    launch_update([wide], step, CONFIG)
    rounding = Rounding(len(part.gradient), WIDE, chunk.memory.device)
    with rounding.widened(replace(part, states=(want[0], want[1], want[2])), 3) as buffers:
        for buffer, x in zip(buffers, wide.states[1:], strict=True):
            buffer.copy_(x)
    for k, smaller in enumerate(replace(part, states=(got[0], got[1], got[2])).split(1700)):
        assert noise.takes(smaller)
        pieces = [Elements(x.gradient, x.states, None, 3, 0.1, at) for x, at in noise.of(smaller, 3)]
        for together in [pieces] if k % 2 else [[piece] for piece in pieces]:
            launch_update(together, step, CONFIG)
    for kind, a, b in zip("wmv", got, want, strict=True):
        assert torch.equal(a, b), f"{kind} in bf16: {int((a != b).sum())} of {len(a)} differ"


def check(device: str) -> None:
    check_exactness(device)
    check_that_a_step_is_left_out(device)
    check_noise(device)


def interpret() -> None:
    """Compare on a CPU."""
    check("cpu")

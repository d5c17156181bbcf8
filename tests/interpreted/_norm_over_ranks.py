"""A norm with the residual add before it, over a dim that ranks divide, beside torch's functions on whole tensors.

Its processes are ranks, which takes longer than the other programs: `test_residual.py` runs it.
"""

from collections.abc import Mapping
from unittest.mock import patch

import torch
from torch import Tensor, nn

from parallel.config.parallel import TensorConfig
from parallel.layout.rng import Dropout
from parallel.tensor.residual import Addend
from tests.accounts import mode_of, part, summed
from tests.harness import run

B, S, H = 4, 3, 40
P, EPS = 0.3, 1e-3
BOUND = 1e-5  # relative, in fp32: some tens of roundings
LAYOUTS: Mapping[str, TensorConfig] = {
    "none": TensorConfig(),
    "2d": TensorConfig(mode="2d", size=2, rows=1),
    "3d": TensorConfig(mode="3d", size=8),
}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.3


def errors(rank: int, world_size: int, kind: str, tensor: TensorConfig) -> dict[str, float]:
    """Return how far kernels, interpreted, are from torch's functions on whole tensors, on each rank for its part."""
    mode = mode_of(rank, tensor, torch.float32)
    between = mode.batch, mode.length, mode.hidden
    norm, whole = (m.norm(kind, H, eps=EPS) for m in (mode, mode_of(0, TensorConfig(), torch.float32)))
    wholes = {name: drawn(B, S, H, seed=i) for i, name in enumerate(("x", "y", "dtotal", "dnormed"))}
    wholes["y_bias"] = drawn(H, seed=5)
    for i, (name, parameter) in enumerate(whole.named_parameters()):
        parameter.data.copy_(drawn(H, seed=6 + i))
        norm.get_parameter(name).data.copy_(part(parameter.data, mode.hidden))
    rows, columns = torch.arange(B * S).view(B, S) + 2**33, torch.arange(H)
    results = []
    for used, of_rank in ((False, whole), (True, norm)):
        splits = between if used else ((), (), ())
        x, y, dtotal, dnormed = (part(wholes[name], *splits).contiguous() for name in ("x", "y", "dtotal", "dnormed"))
        bias = nn.Parameter(part(wholes["y_bias"], splits[2]))
        dropout = Dropout(P, torch.tensor(7), part(rows, *splits[:2]), part(columns, splits[2]))
        for leaf in (x, y):
            leaf.requires_grad_()
        with patch("parallel.ops.kernels.norm.is_fused", lambda name, x, row, used=used: used):
            total, normed = of_rank.residual(x, Addend(y, bias), dropout)
            torch.autograd.backward((total, normed), (dtotal, dnormed))
        assert x.grad is not None
        assert y.grad is not None
        found = {"total": total.detach(), "normed": normed.detach(), "dx": x.grad, "dy": y.grad}
        vectors = {"y_bias": bias, **dict(of_rank.named_parameters())}
        layout = norm.layouts["weight"]
        found |= {f"d{n}": summed(p, layout) if used else p.grad for n, p in vectors.items() if p.grad is not None}
        results.append(found)
    wanted, found = results
    assert wanted.keys() == found.keys()
    wanted = {name: part(x, *(between if x.ndim == 3 else (mode.hidden,))) for name, x in wanted.items()}
    return {name: float((found[name] - want).norm() / want.norm()) for name, want in wanted.items()}


def main() -> None:
    """Compare both kinds of norms in all layouts."""
    for tensor in LAYOUTS.values():
        for kind in ("layer_norm", "rms_norm"):
            for found in run(errors, tensor.size, kind, tensor):
                assert {name: error for name, error in found.items() if error > BOUND} == {}, (kind, tensor, found)


def interpret() -> None:
    """Compare on a CPU."""
    main()

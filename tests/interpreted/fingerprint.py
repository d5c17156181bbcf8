"""Compare the kernel of fingerprints with its reference, to the last bit, for short and long buffers in one launch."""

import torch

from parallel.ops.kernels import fingerprint_triton
from parallel.ops.kernels.fingerprint import COLUMNS, FEW, MIXERS, fingerprints_in_torch, weights
from parallel.ops.kernels.fingerprint_triton import launch_fingerprints

# In words: few and many, and with each number of parts after an odd number of rows.
LENGTHS = (1, 64, FEW - 1, FEW, FEW + 1, 2 * COLUMNS - 1, 2 * COLUMNS, 3 * COLUMNS + 1, 12 * COLUMNS - 1)


def compare(device: str) -> None:
    """Compare the fingerprints of random words, of bf16 numbers, and of a single buffer."""
    generator = torch.Generator().manual_seed(0)
    limits = torch.iinfo(torch.int64)
    buffers = [torch.randint(limits.min, limits.max, (n,), generator=generator).to(device) for n in LENGTHS]
    buffers.append(torch.randn(4 * (5 * COLUMNS + 3), generator=generator).to(device, torch.bfloat16))
    given = weights(buffers[0].device), COLUMNS, MIXERS
    found, expected = launch_fingerprints(buffers, *given), fingerprints_in_torch(buffers)
    assert torch.equal(found, expected), (found != expected).nonzero()
    assert torch.equal(launch_fingerprints(buffers[-1:], *given), expected[-1:])


def interpret() -> None:
    """Compare on a CPU, with sizes that are small there."""
    fingerprint_triton.WORDS = 8192  # fewer programs: the interpreter runs one after the other
    compare("cpu")

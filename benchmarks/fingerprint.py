"""Measure what it costs to notice writes into parameters: a fingerprint of all of them, and a step with and without it.

    python -m benchmarks.fingerprint [--parameters 1.3e9] [--dtype bf16]

On a GPU if there is one. The first line is one fingerprint of a model in chunks of 50 million parameters, with the
bytes that it reads in a second, beside a plain sum of the same bytes; a step computes two fingerprints. The second is
the median ratio of a step's time with and without them, pair by pair, with the smallest and the largest ratio.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import parallel
from parallel.chunk.writes import Writes
from parallel.engine.context import DTYPES
from parallel.ops.kernels.fingerprint import fingerprints

CHUNK = 50_000_000 // 64 * 64
REPEATS, PAIRS = 10, 15


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Return the smallest time of some calls, each with the device's work."""
    times = []
    for _ in range(REPEATS):
        synchronize(device)
        begun = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def without_fingerprints(writes: Writes) -> Callable[[], None]:
    """Switch the fingerprints off, and return a function that switches them on again."""
    zero = torch.zeros((), dtype=torch.float64, device=writes.changed().device)
    writes.changed, writes.note = lambda: zero, lambda: None  # type: ignore[method-assign]

    def restore() -> None:
        del writes.changed, writes.note
        writes.note()

    return restore


def step_ratios(device: torch.device) -> list[float]:
    """Return the time of a step with fingerprints divided by that without, for each pair of steps."""
    parallel.launch_from_torch(config=dict(train=dict(precision="bf16", device=device.type)))
    width = 4096 if device.type == "cuda" else 256
    model = nn.Sequential(*(_block(width) for _ in range(4)))
    engine, *_ = parallel.initialize(model)
    x = torch.randn(8192 if device.type == "cuda" else 512, width)

    def step() -> None:
        engine.backward(engine(x).float().square().mean())
        engine.step()

    ratios = []
    for _ in range(PAIRS):
        with_them = seconds_of_one(step, device)
        restore = without_fingerprints(engine.writes)
        ratios.append(with_them / seconds_of_one(step, device))
        restore()
    return ratios[3:]


def _block(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def seconds_of_one(step: Callable[[], None], device: torch.device) -> float:
    """Return the time of a step: on a CPU that of the processor, which other programs do not change."""
    now = time.perf_counter if device.type == "cuda" else time.process_time
    synchronize(device)
    begun = now()
    step()
    synchronize(device)
    return now() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1.3e9)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32", "fp64"), default="bf16")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[given.dtype]
    chunks = [torch.zeros(CHUNK, dtype=dtype, device=device) for _ in range(max(1, int(given.parameters / CHUNK)))]
    num_bytes = sum(x.nbytes for x in chunks)
    plain: Callable[[], list[Tensor]] = lambda: [x.view(torch.int64).sum() for x in chunks]  # noqa: E731
    ours = seconds_of(lambda: fingerprints(chunks), device)
    sums = seconds_of(plain, device)
    print(
        f"{given.parameters:g} parameters in {given.dtype} on {device.type}: a fingerprint takes {1e3 * ours:.3f} ms"
        f" ({num_bytes / ours / 1e9:.0f} GB/s), a plain sum {1e3 * sums:.3f} ms"
    )
    chunks.clear()
    ratios = step_ratios(device)
    print(
        f"a step takes {statistics.median(ratios):.3f} times as long with fingerprints"
        f" ({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()

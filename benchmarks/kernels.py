"""Measure every fused kernel in one process: bytes a second of large inputs, and microseconds at the sizes of models.

    python -m benchmarks.kernels [--only RMSNorm "cross entropy"]     # on a GPU
    python -m benchmarks.kernels --tiny                               # also without a GPU

The first table has calls that move at least 512 MB: GB/s, and the share of what a copy reaches. The second has the
kernels as models call them: the floor is the time in which a copy moves as many bytes. Beside ours stand torch's own
functions and, where it is installed and has the function, Liger-Kernel's. Without a GPU ours are the references in
torch. `--tiny` compares all results, and prints the time of a call, which says nothing of speeds. The rows are in
benchmarks/kernel_rows.py; a new kernel is one more entry there.

Bytes are counted as each input read once and each output written once. Inputs are random. A round calls the function
with each of several sets of inputs, which together are much larger than the cache, and keeps its outputs, so that
nothing is found in the cache. Device events surround a round, which the host launches while the device waits; the
median of the rounds counts. A contender whose results are not torch's, up to roundings, is marked with `!`, and the
exit code is 1.
"""

import argparse
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median

import torch
from torch import Tensor

from benchmarks.kernel_inputs import MODELS, Inputs, Size
from benchmarks.kernel_rows import COPY, ROWS, Call, Prepare, Row

LARGE_BYTES, SETS_BYTES = 2**29, 2**29
"""The bytes that a large call moves, and those of all sets of inputs of a round, ten times the cache of an H200."""

UNIT = 2**14  # elements
ROUNDS, WARM_UP, MOST_SETS = 20, 3, 16
WAIT_CYCLES = 6_000_000  # of the device at the beginning of a round: 3 ms, in which the host launches all of it

AGREEMENT = 2**-5
"""The norm of the difference from torch's results, relative to these: a few roundings of bf16, or one of 8 bits."""

LINE = "{:<26} {:<13} {:>9} {:>12} {:>12} {:>12}"


@dataclass(frozen=True)
class Bench:
    """The device, and whether everything is tiny."""

    device: torch.device
    tiny: bool

    def seconds(self, row: Row, prepare: Prepare, size: Size) -> float:
        """Return the seconds of a call: the median over rounds, of which the first ones compile."""
        sets = 2 if self.tiny else max(2, min(MOST_SETS, SETS_BYTES // moved(row, size)))
        calls = [prepare(*row.draw(size, self.device, seed)) for seed in range(sets)]
        warm_up, rounds = (0, 2) if self.tiny else (WARM_UP, ROUNDS)
        times = [self._round(calls) for _ in range(warm_up + rounds)]
        return median(times[warm_up:]) / sets

    def _round(self, calls: list[Call]) -> float:
        """Return the seconds of all calls together. All results live until the end, so each has memory of its own."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            kept = [call() for call in calls]
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(WAIT_CYCLES)
        begin.record()
        kept = [call() for call in calls]
        end.record()
        torch.cuda.synchronize()
        del kept
        return float(begin.elapsed_time(end)) / 1e3

    def agrees(self, row: Row, prepare: Prepare, size: Size) -> bool:
        """Return whether a contender's results are torch's, up to roundings, for the same inputs."""
        if row.is_random:
            return True
        results = [one(*row.draw(size, self.device, 0))() for one in (row.contenders["torch"], prepare)]
        pairs = zip(*map(_tensors, results), strict=True)
        return all(_is_close(found, expected) for expected, found in pairs)

    def measure(self, row: Row, size: Size) -> dict[str, float | str]:
        """Return, for each contender, the seconds of a call, or why there are none; and "wrong" where it is wrong."""
        found: dict[str, float | str] = {}
        for name, prepare in row.contenders.items():
            if name == "liger" and (self.device.type != "cuda" or find_spec("liger_kernel") is None):
                continue
            try:
                found[name] = self.seconds(row, prepare, size) if self.agrees(row, prepare, size) else "wrong !"
            except Exception as error:  # the others can still run
                found[name] = f"failed !: {type(error).__name__}: {str(error).partition(chr(10))[0][:80]}"
        return found

    def large(self, row: Row) -> Size:
        """Return the size of a row's calls that move LARGE_BYTES, with the columns of the first model that has it."""
        size = next(size for model in MODELS if (size := row.size(model)) is not None)
        if self.tiny:
            return Size(min(size.rows, 16), 192)
        if size.rows == 1:  # a multiple of what any kernel reads at a time, as a chunk of large matrices is
            return Size(1, -(-LARGE_BYTES // int(row.bytes_per_element * UNIT)) * UNIT)
        return Size(-(-LARGE_BYTES // int(row.bytes_per_element * size.columns)), size.columns)


def moved(row: Row, size: Size) -> int:
    """Return the bytes that a call moves at least."""
    return int(row.bytes_per_element * size.rows * size.columns)


def _tensors(found: Tensor | Inputs) -> Inputs:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    difference = (found.double() - expected.double()).norm()
    return bool(difference <= AGREEMENT * expected.double().norm())


def print_line(name: str, model: str, floor: str, cells: dict[str, str]) -> None:
    print(LINE.format(name, model, floor, *(cells.get(one, "") for one in ("ours", "torch", "liger"))), flush=True)


def print_speeds(bench: Bench, rows: Iterable[Row], copied: float) -> bool:
    """Print GB/s of large calls, and the share of a copy's, or µs of tiny calls; return whether all are right."""
    title = "tiny calls, µs" if bench.tiny else "large calls, GB/s"
    print_line(title, "", "MB moved", {"ours": "ours", "torch": "torch", "liger": "liger"})
    right = True
    for row in rows:
        size = bench.large(row)
        bytes_moved = moved(row, size)
        cells = {}
        for name, value in bench.measure(row, size).items():
            if isinstance(value, str):
                cells[name], right = value, False
            elif bench.tiny:
                cells[name] = f"{value * 1e6:.0f}"
            else:
                speed = bytes_moved / value
                cells[name] = f"{speed / 1e9:.4g} {speed / copied:4.0%}"
        print_line(row.name, "", f"{bytes_moved / 1e6:.0f}", cells)
    return right


def print_times(bench: Bench, rows: Iterable[Row], copied: float) -> bool:
    """Print the microseconds of calls at the sizes of models, beside the floor; return whether all are right."""
    print_line("microseconds", "model", "floor", {"ours": "ours", "torch": "torch", "liger": "liger"})
    right = True
    for row in rows:
        for model in MODELS:
            size = row.size(model)
            if size is None:
                continue
            found = bench.measure(row, size)
            cells = {name: x if isinstance(x, str) else f"{x * 1e6:.1f}" for name, x in found.items()}
            right &= not any(isinstance(x, str) for x in found.values())
            print_line(row.name, model.name, f"{moved(row, size) / copied * 1e6:.1f}", cells)
    return right


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny inputs, and no table of models")
    parser.add_argument("--only", nargs="+", choices=[row.name for row in ROWS], metavar="KERNEL")
    arguments = parser.parse_args(given)
    bench = Bench(torch.device("cuda" if torch.cuda.is_available() else "cpu"), tiny=arguments.tiny)
    rows = [row for row in ROWS if arguments.only is None or row.name in arguments.only]
    size = bench.large(COPY)
    copied = moved(COPY, size) / bench.seconds(COPY, COPY.contenders["torch"], size)
    where = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    speed = "" if arguments.tiny else f": a copy moves {copied / 1e9:.0f} GB/s"
    print(f"{where}, torch {torch.__version__}{speed}\n")
    right = print_speeds(bench, rows, copied)
    if not arguments.tiny:
        print()
        right &= print_times(bench, rows, copied)
    sys.exit(not right)


if __name__ == "__main__":
    main()

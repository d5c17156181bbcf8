"""Measure tokens a second and memory on one GPU, in bf16 and fp8: our engine beside Hugging Face's model in torch.

    python -m benchmarks.one_gpu [--model opt-1.3b] [--batch 8] [--sequence 1024] [--steps 10] [--only ours hf fsdp2]
    python -m benchmarks.one_gpu --model llama-3.2-1b --batch 8 4 --sequence 1024 4096     # two tables
    python -m benchmarks.one_gpu --model opt-6.7b --layers 8 --only ours ours_fp8 torchao_fp8
    python -m benchmarks.one_gpu --tiny                                                    # also without a GPU

It prints a table for each pair of batch and sequence, with a line for each contender: the median of tokens a second,
the smallest and the largest, the model FLOPs utilization (MFU), the peak memory of the GPU in GiB, and the first and
the last loss. The exit code says whether the losses agree.

Each contender runs in a new process. All start from the same random weights and train on the same random tokens, with
dropout 0. Without a GPU they run on the CPU.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch

import models
import parallel
from benchmarks.gpu_contenders import CONTENDERS, IN_8_BITS, Result, Work, measure
from benchmarks.peers import UnavailableError
from benchmarks.workload import without_dropout
from models.costs import flops_per_token
from models.family import named_sizes
from models.hf import export
from models.shapes import from_hugging_face, resolve, shape_of

AGREEMENT = 2**-7  # the difference allowed between losses, relative to the first loss: bf16's epsilon
AGREEMENT_IN_8_BITS = 2**-5
"""The same where a contender multiplies in 8 bits, whose epsilon is 2^-3.

A loss is a mean over thousands of tokens. Roundings that are independent of each other cancel in it, and what remains
is of second order: (2^-3)^2 = 2^-6, for the forward's operands and once more for the gradients that led to the weights.
"""

USUAL = dict(model="opt-1.3b", batch=[8], sequence=[1024], steps=10)
TINY = dict(model="llama-tiny", batch=[2], sequence=[32], steps=2)
COLUMNS = "{:<17} {:>9} {:>17} {:>6} {:>9} {:>10} {:>9}"


def save_start(model: str, folder: Path, *, layers: int | None = None) -> None:
    """Save the weights that a seed draws for a named model, with dropout 0, as a Hugging Face directory in fp32.

    `layers`: so many blocks instead of the model's.
    """
    shape = named_sizes()[model]
    named = dict(name=model) | without_dropout(shape)
    if layers is not None:
        named[shape.field("num_hidden_layers")] = layers
    context = parallel.launch_from_torch(dict(model=named, train=dict(device="cpu")), resolve=resolve)
    pieces = [piece for info in models.build(context).infos for piece in info.pieces()]
    export(folder, pieces, shape=shape_of(context.config), axis=context.mesh.world, dtype=torch.float32)


def run(name: str, work: Work) -> Result:
    """Call `measure` in a new process, which then ends."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, name, work).result()


def line(name: str, result: Result, work: Work) -> str:
    """Return a contender's line of the table."""
    tokens = work.batch * work.sequence
    speeds = [tokens / seconds for seconds in result.seconds]
    speed, spread = median(speeds), f"{min(speeds):.0f}-{max(speeds):.0f}"
    flops = speed * flops_per_token(from_hugging_face(work.folder), work.sequence)
    mfu = f"{flops / result.peak_tflops / 1e12:.1%}" if result.peak_tflops else ""
    peak = f"{result.peak_bytes / 2**30:.2f}" if result.peak_bytes else ""
    first, last = result.losses[0], result.losses[-1]
    return COLUMNS.format(name, f"{speed:.0f}", spread, mfu, peak, f"{first:.4f}", f"{last:.4f}")


def agree(one: Result, other: Result, bound: float = AGREEMENT) -> bool:
    """Return whether the first losses agree, and the last ones too; NaN agrees with nothing."""
    return all(abs(one.losses[i] - other.losses[i]) <= bound * one.losses[0] for i in (0, -1))


def disagreeing(results: Mapping[str, Result]) -> list[str]:
    """Return the contenders whose losses are not those of the first one."""
    different = []
    for name, result in results.items():
        first = next(iter(results))
        bound = AGREEMENT if {first, name}.isdisjoint(IN_8_BITS) else AGREEMENT_IN_8_BITS
        if not agree(results[first], result, bound):
            different.append(name)
    return different


def table(work: Work, names: list[str]) -> bool:
    """Print the table of a work; return whether all contenders ran, or cannot run here, and their losses agree."""
    print(COLUMNS.format("", "tokens/s", "min-max", "MFU", "peak GiB", "first loss", "last loss"), flush=True)
    results: dict[str, Result] = {}
    failed = False
    for name in names:
        try:
            results[name] = run(name, work)
            print(line(name, results[name], work), flush=True)
        except (parallel.ConfigError, UnavailableError) as error:
            print(f"{name:<17} not available: {error}", flush=True)
        except Exception as error:  # most likely it ran out of memory, and the others can still run
            failed = True
            print(f"{name:<17} failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}", flush=True)
    if different := disagreeing(results):
        print(f"The losses of {', '.join(different)} disagree: these were not the same computation.", flush=True)
    return not failed and not different


def arguments_of(given: list[str] | None, *, on_gpu: bool) -> argparse.Namespace:
    """Parse the command line. What it leaves out depends on `--tiny`, which is usual where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, few tokens and few steps")
    parser.add_argument("--model", choices=named_sizes())
    parser.add_argument("--layers", type=int, help="blocks, instead of the model's own number")
    parser.add_argument("--batch", type=int, nargs="+", help="samples of a step, one number for each table")
    parser.add_argument("--sequence", type=int, nargs="+", help="tokens of a sample, one number for each table")
    parser.add_argument("--steps", type=int, help="timed steps of a round, after a few that are not")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    arguments = parser.parse_args(given)
    usual = USUAL if on_gpu and not arguments.tiny else TINY
    for name, value in usual.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if len(arguments.batch) != len(arguments.sequence):
        parser.error("--batch and --sequence need equally many numbers, one of each for a table")
    return arguments


def main(given: list[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    arguments = arguments_of(given, on_gpu=on_gpu)
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    begun, agreed = time.monotonic(), True
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "start")
        save_start(arguments.model, folder, layers=arguments.layers)
        for batch, sequence in zip(arguments.batch, arguments.sequence, strict=True):
            name = arguments.model + (f" with {arguments.layers} layers" if arguments.layers else "")
            print(f"{name}, {batch} × {sequence} tokens; {where}, torch {torch.__version__}")
            agreed &= table(Work(folder, batch, sequence, arguments.steps), arguments.only)
            print(f"{time.monotonic() - begun:.0f} s since the start\n", flush=True)
    sys.exit(not agreed)


if __name__ == "__main__":
    main()

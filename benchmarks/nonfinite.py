"""Measure what it costs that a step looks at its own numbers: steps with and without the check, in turns.

    python -W ignore -m benchmarks.nonfinite [--model opt-tiny] [--precision fp32] [--device cpu] [--steps 60]
        [--batch 8] [--sequence 256] [--placement cuda]

It prints the median time of a step with the flag on the device that the update honours, that of a step without it, the
median of the quotients of neighbours, and the time of one check of all weights and moments, as before a checkpoint.
Both kinds of steps are those of one engine; their order changes from pair to pair. On a GPU the steps of a kind follow
each other without a wait, four at a time, so that work which the host prepares ahead counts as in a run.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from models import build
from models.shapes import resolve, shape_of
from parallel.config import parse
from parallel.engine import base
from parallel.engine.context import Place, make_context
from parallel.engine.engine import Engine

WARM_UP = 6


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-tiny")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--placement", default="cuda", choices=("cuda", "cpu", "auto"))
    for name, default in (("--steps", 60), ("--batch", 8), ("--sequence", 256)):
        parser.add_argument(name, type=int, default=default)
    return parser.parse_args()


def engine_of(arguments: argparse.Namespace) -> Engine:
    raw: dict[str, Any] = dict(
        model=dict(name=arguments.model),
        data=dict(sequence_length=arguments.sequence),
        zero=dict(tensor_placement_policy=arguments.placement),
        train=dict(
            steps=10**6,
            global_batch_size=arguments.batch,
            micro_batch_size=arguments.batch,
            precision=arguments.precision,
            device=arguments.device,
        ),
    )
    config = parse(raw, world_size=1, resolve=resolve)
    context = make_context(config, Place())
    engine = Engine(build(context), context)
    engine.writes.stop()  # as in a run
    return engine


@contextmanager
def without_check() -> Iterator[None]:
    """Have updates look at no flag in the block."""

    def unchecked(*arguments: Any, found_inf: Tensor, **options: Any) -> None:
        adamw(*arguments, **options)

    zeros: dict[torch.device, Tensor] = {}

    def no_flag(*numbers: Tensor) -> Tensor:
        device = numbers[0].device
        if device not in zeros:
            zeros[device] = torch.zeros((), device=device)
        return zeros[device]

    with patch("parallel.optim.adamw.adamw", unchecked), patch.object(base, "found_inf", no_flag):
        yield


def seconds_of(engine: Engine, batches: list[dict[str, Tensor]], *, checks: bool) -> float:
    """Return the seconds of a step, the mean over these batches."""
    synchronize(engine)
    started = time.perf_counter()
    for batch in batches:
        if checks:
            engine.train_step(batch)
        else:
            with without_check():
                engine.train_step(batch)
    synchronize(engine)
    return (time.perf_counter() - started) / len(batches)


def synchronize(engine: Engine) -> None:
    if engine.mesh.device.type == "cuda":
        torch.cuda.synchronize(engine.mesh.device)


def main() -> None:
    arguments = read_arguments()
    engine = engine_of(arguments)
    generator = torch.Generator().manual_seed(0)
    size = 4 if engine.mesh.device.type == "cuda" else 1
    shape, vocabulary = (arguments.batch, arguments.sequence), shape_of(engine.config).vocab_size
    batches = [dict(input_ids=torch.randint(4, vocabulary, shape, generator=generator)) for _ in range(size)]
    for _ in range(WARM_UP):
        seconds_of(engine, batches, checks=True)
    found: dict[bool, list[float]] = {True: [], False: []}
    for pair in range(arguments.steps // size):
        for checks in (True, False) if pair % 2 else (False, True):
            found[checks].append(seconds_of(engine, batches, checks=checks))
    ratios = [a / b for a, b in zip(found[True], found[False], strict=True)]
    scans = []
    for _ in range(5):
        synchronize(engine)
        started = time.perf_counter()
        engine.check_finite("", states=True)
        scans.append(time.perf_counter() - started)
    num_bytes = sum(piece.data.nbytes for piece in engine.state_pieces())
    print(f"{arguments.model} {arguments.precision} on {engine.mesh.device}: {arguments.batch} × {arguments.sequence}")
    print(f"a step with the check     {1e3 * median(found[True]):9.3f} ms")
    print(f"a step without it         {1e3 * median(found[False]):9.3f} ms")
    print(f"with ÷ without            {median(ratios):9.4f}")
    print(f"a check of all states     {1e3 * min(scans):9.3f} ms, {num_bytes / 2**20:,.1f} MiB")


if __name__ == "__main__":
    main()

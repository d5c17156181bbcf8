r"""Measure what the time of a training step consists of: kernels in groups beside their floors, and gaps.

    python -m benchmarks.profile_step --set model.name=opt-1.3b model.dropout=0.0 data.sequence_length=1024 \
        train.global_batch_size=8 train.micro_batch_size=8 train.precision=bf16 [train.compile=True]

On a GPU it prints tokens a second without the profiler; then, of profiled steps, the milliseconds and launches of each
group of kernels a step, and the floor that follows from the model's shape (benchmarks/floors.py); the longest kernels
of each group that `--kernels` names; and the gaps by their length, with the longest ones and their neighbours. The
profiler makes gaps longer: the time without it, less that of the kernels, is what they really are.

`--operations` prints the operations of two steps by their time instead, as torch.profiler does. Without a GPU this is
all that it prints.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.profiler import profile

import models
import parallel
from benchmarks.anatomy import NAMES, Kernel, by_length, gaps_of, group_of, kernels_of, totals
from benchmarks.floors import StepSize, floors
from models.linears import linears_in_8_bits
from models.shapes import resolve, shape_of
from parallel.config import Config, apply_overrides, parse
from parallel.ops.captured import CALLS_BEFORE

WARM_UP, TIMED, PROFILED = CALLS_BEFORE + 3, 10, 2
LINE = "| {:<16} | {:>9} | {:>8} | {:>9} | {:>7} |"


def print_operations(profiler: profile, rows: int, *, is_gpu: bool) -> None:
    key = "self_cuda_time_total" if is_gpu else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=rows, max_name_column_width=60))


def trace_of(profiler: profile) -> list[Kernel]:
    """Return what ran on the device."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return kernels_of(json.loads(path.read_text())["traceEvents"])


def print_groups(kernels: Sequence[Kernel], step: StepSize) -> None:
    """Print the table of groups, as Markdown."""
    print(LINE.format("a step", "ms", "launches", "floor, ms", "× floor"))
    print("|------------------|----------:|---------:|----------:|--------:|")
    limits, found = floors(step), totals(kernels)
    for name in NAMES:
        if found[name][1]:
            print_group(name, *found[name], limits.get(name, 0.0))
    microseconds = sum(total for total, _ in found.values())
    print_group("all kernels", microseconds, len(kernels), sum(limits.values()))


def print_group(name: str, microseconds: float, launches: int, floor: float) -> None:
    milliseconds, floor = microseconds / 1e3 / PROFILED, floor * 1e3
    ratio = f"{milliseconds / floor:.2f}" if floor else ""
    print(LINE.format(name, f"{milliseconds:.2f}", f"{launches / PROFILED:.0f}", f"{floor:.2f}", ratio))


def print_kernels(kernels: Sequence[Kernel], groups: Sequence[str], rows: int) -> None:
    """Print the kernels that take the most time in these groups."""
    before, durations, launches = "", Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for kernel in kernels:
        before = group_of(kernel.name, before)
        durations[before, kernel.name] += round(kernel.duration * 1e3)
        launches[before, kernel.name] += 1
    for group in groups:
        ours = [(x, name) for (of, name), x in durations.most_common() if of == group]
        for nanoseconds, name in ours[:rows]:
            count = launches[group, name] / PROFILED
            print(f"{group:<16} {nanoseconds / 1e6 / PROFILED:8.3f} ms {count:6.0f} launches  {name[:150]}")


def print_gaps(kernels: Sequence[Kernel], rows: int) -> None:
    gaps = gaps_of(kernels)
    lengths = [f"{name} {x / 1e3 / PROFILED:.2f} ms in {n / PROFILED:.0f}" for name, (x, n) in by_length(gaps).items()]
    print("gaps, profiled: " + ", ".join(lengths))
    for gap in sorted(gaps, key=lambda gap: -gap.duration)[:rows]:
        print(f"{gap.duration:9.0f} µs  {gap.before[:60]}  ->  {gap.after[:60]}")


def seconds_of(step: Callable[[], object]) -> float:
    """Return the seconds of a step without the profiler."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(TIMED):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / TIMED


def measured(config: Config, step: Callable[[], object], profiler: profile) -> StepSize:
    """Print the time of a step without the profiler, then profile; return what floors depend on."""
    train, tokens = config.train, config.train.global_batch_size * config.data.sequence_length
    seconds = seconds_of(step)
    print(f"{tokens / seconds:.0f} tokens/s, {seconds * 1e3:.1f} ms a step without the profiler")
    print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    with profiler:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    moment_bytes = 2 if config.optimizer.state_dtype == "bf16" else 4
    shape = shape_of(config)
    in_8_bits = linears_in_8_bits(shape, train)
    return StepSize(shape, train.global_batch_size, config.data.sequence_length, moment_bytes, in_8_bits)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="+", default=[], help="keys of the config")
    parser.add_argument("--operations", action="store_true", help="operations by time; always without a GPU")
    groups = "the groups whose longest kernels are listed; all but matmuls and casts"
    parser.add_argument(
        "--kernels", nargs="*", choices=NAMES, metavar="GROUP", default=list(NAMES[2:]), help=f"{groups}: {NAMES}"
    )
    parser.add_argument("--rows", type=int, default=8, help="the rows of each list; 8")
    arguments = parser.parse_args(given)
    config = parse(apply_overrides({}, arguments.set), world_size=1, resolve=resolve)
    context = parallel.launch_from_torch(config)
    engine = parallel.Engine(models.build(context), context)
    vocabulary, samples = shape_of(config).vocab_size, config.train.global_batch_size
    batch = {"input_ids": torch.randint(4, vocabulary, (samples, config.data.sequence_length))}
    for _ in range(WARM_UP):
        engine.train_step(batch)
    is_gpu = context.device.type == "cuda"
    if arguments.operations or not is_gpu:
        with profile() as profiler:
            for _ in range(PROFILED):
                engine.train_step(batch)
        print_operations(profiler, arguments.rows, is_gpu=is_gpu)
        return
    profiler = profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    size = measured(config, lambda: engine.train_step(batch), profiler)
    kernels = trace_of(profiler)
    print_groups(kernels, size)
    print_kernels(kernels, arguments.kernels, arguments.rows)
    print_gaps(kernels, arguments.rows)


if __name__ == "__main__":
    main()

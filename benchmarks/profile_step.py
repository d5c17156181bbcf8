r"""Measure the time that each torch operation takes in a training step.

    python -m benchmarks.profile_step --set model.name=opt-1.3b model.dropout=0.0 data.sequence_length=1024 \
        train.global_batch_size=8 train.micro_batch_size=8 train.precision=bf16

It prints torch.profiler's table of two steps, the most expensive operations first: `--rows` says how many.
"""

import argparse

import torch

import models
import parallel
from models.shapes import resolve, shape_of
from parallel.config import apply_overrides, parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="+", default=[])
    parser.add_argument("--rows", type=int, default=25)
    arguments = parser.parse_args()
    config = parse(apply_overrides({}, arguments.set), world_size=1, resolve=resolve)
    context = parallel.launch_from_torch(config)
    engine = parallel.Engine(models.build(context), context)
    vocabulary, samples = shape_of(config).vocab_size, config.train.global_batch_size
    batch = {"input_ids": torch.randint(4, vocabulary, (samples, config.data.sequence_length))}
    for _ in range(3):
        engine.train_step(batch)
    with torch.profiler.profile() as profiler:
        for _ in range(2):
            engine.train_step(batch)
    key = "self_cuda_time_total" if context.device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=key, row_limit=arguments.rows, max_name_column_width=60))


if __name__ == "__main__":
    main()

"""OPT in bf16 on one GPU whose memory is capped: tokens a second and peak, a line for each batch and placement.

    python -m benchmarks.offload --model opt-1.3b --device-memory 6GiB --policies cpu auto --batches 16 32 [--steps 4]

Random weights, sequences of 1024 random tokens, fp32 masters and moments, clipping, activations recomputed.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch

import models
import parallel
from models.shapes import NAMED, resolve, shape_of
from training.metrics import peak_device_bytes, peak_host_bytes

SEQUENCE = 1024
WARM_UP = 4  # steps


def measure(model: str, zero: dict[str, Any], batch: int, steps: int) -> dict[str, Any]:
    """Seconds of each step, the losses, and the most bytes on the device and the host."""
    config: dict[str, Any] = dict(
        model=dict(name=model, dropout=0.0),
        data=dict(sequence_length=SEQUENCE),
        train=dict(global_batch_size=batch, micro_batch_size=batch, precision="bf16", activation_checkpointing="full"),
        zero=zero,
        lr_scheduler=dict(kind="constant", warmup_steps=0),
        optimizer=dict(lr=1e-4),
    )
    start = time.perf_counter()
    context = parallel.launch_from_torch(config, resolve=resolve)
    engine = parallel.Engine(models.build(context), context)
    engine.placer.say = lambda text: print(text, flush=True)
    ready = time.perf_counter() - start
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, shape_of(context.config).vocab_size, (batch, SEQUENCE), generator=generator)
    seconds, losses = [], []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        losses.append(engine.train_step({"input_ids": ids}).loss)
        seconds.append(time.perf_counter() - start)
    device = context.device
    if device.type == "cuda":
        torch.cuda.synchronize()
    return dict(
        ready=ready, seconds=seconds[WARM_UP:], losses=losses, device=peak_device_bytes(device), host=peak_host_bytes()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NAMED, default="opt-1.3b")
    parser.add_argument("--device-memory", default="6GiB")
    parser.add_argument("--policies", nargs="+", default=["cpu"])
    parser.add_argument("--batches", nargs="+", type=int, default=[16])
    parser.add_argument("--margin", type=float, default=0.8, help="zero.gpu_margin_mem_ratio")
    parser.add_argument("--steps", type=int, default=4, help="timed steps, after four that are not")
    arguments = parser.parse_args()
    for policy in arguments.policies:
        for batch in arguments.batches:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                zero = dict(tensor_placement_policy=policy, device_memory=arguments.device_memory)
                zero |= dict(gpu_margin_mem_ratio=arguments.margin)
                try:
                    found = pool.submit(measure, arguments.model, zero, batch, arguments.steps).result()
                except Exception as error:
                    print(f"{policy:<5} batch {batch}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                    continue
            speed = batch * SEQUENCE / median(found["seconds"])
            memory = " ".join(f"{name} {found[name] / 2**30:.2f}" for name in ("device", "host") if found[name])
            losses = " ".join(f"{loss:.4f}" for loss in found["losses"])
            print(
                f"{arguments.model} {arguments.device_memory} {policy:<5} batch {batch}: {speed:.0f} tokens/s, a step"
                f" {median(found['seconds']):.3f} s; GiB: {memory}; ready in {found['ready']:.0f} s; losses {losses}",
                flush=True,
            )


if __name__ == "__main__":
    main()

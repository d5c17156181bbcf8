"""OPT in bf16 on one GPU whose memory is capped: tokens a second and peak, a line for each batch and placement.

    python -m benchmarks.offload --model opt-1.3b --device-memory 6GiB --policies auto fsdp2 --batches 6 24 [--steps 4]

Random weights, sequences of 1024 random tokens, fp32 masters and moments, clipping, activations recomputed. A policy
is one of `zero.tensor_placement_policy`, or fsdp2: Hugging Face's model under torch's FSDP2 with its CPU offload.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.utils import clip_grad_norm_

import models
import parallel
from benchmarks.peers import adamw
from benchmarks.workload import Step
from models.shapes import NAMED, OPTShape, resolve, shape_of
from parallel.config import parse
from training.metrics import peak_device_bytes, peak_host_bytes

SEQUENCE, LR = 1024, 1e-4
WARM_UP = 4  # steps


def measure(model: str, zero: dict[str, Any], batch: int, steps: int) -> dict[str, Any]:
    """Seconds of each step, the losses, and the most bytes on the device and the host."""
    start = time.perf_counter()
    build = fsdp2 if zero["tensor_placement_policy"] == "fsdp2" else ours
    step, shape = build(model, zero, batch)
    ready = time.perf_counter() - start
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, shape.vocab_size, (batch, SEQUENCE), generator=generator)
    seconds, losses = [], []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        losses.append(step(ids))
        seconds.append(time.perf_counter() - start)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return dict(
        ready=ready, seconds=seconds[WARM_UP:], losses=losses, device=peak_device_bytes(device), host=peak_host_bytes()
    )


def ours(model: str, zero: dict[str, Any], batch: int) -> tuple[Step, OPTShape]:
    train = dict(global_batch_size=batch, micro_batch_size=batch, precision="bf16", activation_checkpointing="full")
    config: dict[str, Any] = dict(
        model=dict(name=model, dropout=0.0),
        data=dict(sequence_length=SEQUENCE),
        train=train,
        zero=zero,
        lr_scheduler=dict(kind="constant", warmup_steps=0),
        optimizer=dict(lr=LR),
    )
    context = parallel.launch_from_torch(config, resolve=resolve)
    engine = parallel.Engine(models.build(context), context)
    engine.placer.say = lambda text: print(text, flush=True)
    return lambda ids: engine.train_step({"input_ids": ids}).loss, shape_of(context.config)


def fsdp2(model: str, zero: dict[str, Any], batch: int) -> tuple[Step, OPTShape]:
    from transformers import OPTConfig, OPTForCausalLM

    config = parse(dict(model=dict(name=model, dropout=0.0), zero=dict(device_memory=zero["device_memory"])))
    shape = shape_of(config)
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((config.zero.device_memory or total) / total, device)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    fields = {key: value for key, value in asdict(shape).items() if key != "remove_final_layer_norm"}
    made: Any = OPTConfig(**fields)
    module: Any = OPTForCausalLM._from_config(made, attn_implementation="sdpa").train()
    module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    how: Any = dict(
        mesh=init_device_mesh("cuda", (1,)),
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        offload_policy=CPUOffloadPolicy(),
    )
    for layer in module.model.decoder.layers:
        fully_shard(layer, **how)
    fully_shard(module, **how)
    optimizer = adamw(module.parameters(), lr=LR)

    def step(ids: Tensor) -> float:
        ids = ids.to(device)
        loss: Tensor = module(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, shape


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

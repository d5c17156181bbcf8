"""Measure training on one GPU whose memory is capped, for each batch size and placement, in bf16.

    python -m benchmarks.offload table-1.3b table-2.7b table-6.7b                     # with FSDP2
    python -m benchmarks.offload largest-6.7b largest-13b largest-18b --warm-up 2 --steps 3
    python -m benchmarks.offload --model opt-1.3b --device-memory 6GiB --policies auto fsdp2 --batches 6 24

It prints a line for each case: tokens a second, the seconds of a step, `floor` (the least seconds that any program
would need: see `floor_of`), the peak memory of device and host in GiB, the seconds until it was ready, and the losses.
For our engine a second line has the number of parameters, and the bytes of each on the device, the host and the disk.

Weights are random, sequences are 1024 random tokens, master weights and moments are fp32, gradients are clipped, and
activations are recomputed. A policy is a value of `zero.tensor_placement_policy`, or fsdp2: Hugging Face's model under
torch's FSDP2 with its CPU offload.
"""

import argparse
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

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
from models.costs import flops_per_token, parameter_count
from models.opt.shape import SIZES
from models.shape import ModelShape
from models.shapes import resolve, shape_of
from parallel.config import parse
from parallel.storage.transfer import Tier
from training.metrics import peak_device_bytes, peak_host_bytes

SEQUENCE, LR = 1024, 1e-4
SLOW = 5.0  # seconds: a step that takes longer is printed when it ends
MATMUL, COPY, UPDATE = 790e12, 55e9, 0.24e-9  # FLOP/s in bf16; bytes/s in each direction; seconds for an element

Contender: TypeAlias = tuple[Step, ModelShape, parallel.Engine | None]


@dataclass(frozen=True)
class Case:
    """A model whose shape may be changed, the cap on the device's memory, and further settings of its config."""

    model: str
    device_memory: str
    policy: str
    batch: int
    shape: Mapping[str, int] = field(default_factory=dict)
    zero: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        changes = {**self.shape, **self.train, **self.optimizer}
        return " ".join((self.model, *(f"{key}={value}" for key, value in changes.items())))


LEAN = dict(state_dtype="bf16")
DISK = dict(nvme_dir="/tmp/colonnade")
FULL = DISK | dict(host_memory="115GiB")  # of 125 GiB: more than the default share
WIDER = dict(hidden_size=6144, word_embed_proj_dim=6144, ffn_dim=24576, num_attention_heads=48)

SETS = {
    "table-1.3b": [
        Case("opt-1.3b", "6GiB", "auto", 24),
        Case("opt-1.3b", "6GiB", "fsdp2", 6),
        Case("opt-1.3b", "12GiB", "auto", 48),
        Case("opt-1.3b", "12GiB", "fsdp2", 16),
        Case("opt-1.3b", "24GiB", "auto", 8),
        Case("opt-1.3b", "24GiB", "auto", 16),
        Case("opt-1.3b", "24GiB", "fsdp2", 8),
    ],
    "lean-1.3b": [
        Case("opt-1.3b", "6GiB", "auto", 24, optimizer=LEAN),
        Case("opt-1.3b", "6GiB", "auto", 48, train=dict(activation_checkpointing="offload")),
        Case("opt-1.3b", "6GiB", "auto", 24, zero=DISK | dict(host_memory="10GiB"), optimizer=LEAN),
    ],
    "table-2.7b": [Case("opt-2.7b", "24GiB", "auto", 8), Case("opt-2.7b", "24GiB", "fsdp2", 8)],
    "table-6.7b": [Case("opt-6.7b", "24GiB", "auto", 48), Case("opt-6.7b", "24GiB", "fsdp2", 24)],
    "largest-6.7b": [Case("opt-6.7b", "6GiB", "auto", 8)],
    "largest-13b": [Case("opt-13b", "24GiB", "auto", 32, zero=FULL, optimizer=LEAN)],
    "largest-18b": [Case("opt-13b", "24GiB", "auto", 16, shape=WIDER, zero=FULL, optimizer=LEAN)],
}


def measure(case: Case, warm_up: int, steps: int) -> dict[str, Any]:
    """Train a case; return the seconds of each step, the losses, and the peak memory of the device and the host."""
    start = time.perf_counter()
    step, shape, engine = fsdp2(case) if case.policy == "fsdp2" else ours(case)
    ready = time.perf_counter() - start
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, shape.vocab_size, (case.batch, SEQUENCE), generator=generator)
    seconds, losses = [], []
    for _ in range(warm_up + steps):
        start = time.perf_counter()
        losses.append(step(ids))
        seconds.append(time.perf_counter() - start)
        if seconds[-1] > SLOW:  # so that the output shows progress
            print(f"    step {len(losses)}: {seconds[-1]:.1f} s, loss {losses[-1]:.4f}", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return dict(
        ready=ready,
        seconds=seconds[warm_up:],
        losses=losses,
        device=peak_device_bytes(device),
        host=peak_host_bytes(),
        floor=floor_of(shape, case.batch, engine),
        elements=parameter_count(shape),
        tiers={} if engine is None else {tier.name.lower(): count for tier, count in engine.held().items()},
    )


def floor_of(shape: ModelShape, batch: int, engine: parallel.Engine | None) -> float:
    """Return the least seconds that a step needs, at the rates of an H200 with 16 cores.

    First there are matmuls or copies, whichever take longer. The matmuls include those of a second forward, except each
    block's last one. A parameter that is offloaded to the host is copied to the device twice, in bf16, and its gradient
    once in the other direction. Then comes the update of states on the host, which needs the norm of all gradients.
    """
    chunks = [] if engine is None else engine.chunks
    count = sum(chunk.size for chunk in chunks) or parameter_count(shape)
    on_host = [sum(c.size for c in chunks if c.placement.parameters is Tier.HOST) if chunks else count]
    on_host += [sum(c.size for c in chunks if c.placement.states is not Tier.DEVICE) if chunks else count]
    parameters, states = on_host
    matmuls = batch * SEQUENCE * flops_per_token(shape, SEQUENCE) * (11 / 9) / MATMUL
    return max(matmuls, 2 * 2 * parameters / COPY, 2 * states / COPY) + states * UPDATE


def ours(case: Case) -> Contender:
    """Make our engine, which prints its placement plans."""
    train = dict(global_batch_size=case.batch, micro_batch_size=case.batch, precision="bf16")
    zero = dict(tensor_placement_policy=case.policy, device_memory=case.device_memory)
    config: dict[str, Any] = dict(
        model=dict(name=case.model, dropout=0.0, **case.shape),
        data=dict(sequence_length=SEQUENCE),
        train={**train, "activation_checkpointing": "full", **case.train},
        zero={**zero, **case.zero},
        lr_scheduler=dict(kind="constant", warmup_steps=0),
        optimizer={"lr": LR, **case.optimizer},
    )
    context = parallel.launch_from_torch(config, resolve=resolve)
    engine = parallel.Engine(models.build(context), context)
    engine.writes.stop()  # as in `colonnade train`
    engine.placement_manager.log = lambda text: print(text, flush=True)
    return lambda ids: engine.train_step({"input_ids": ids}).loss, shape_of(context.config), engine


def fsdp2(case: Case) -> Contender:
    """Make Hugging Face's model under FSDP2 with CPU offload."""
    from transformers import OPTConfig, OPTForCausalLM

    config = parse(dict(model=dict(name=case.model, dropout=0.0), zero=dict(device_memory=case.device_memory)))
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

    return step, shape, None


def show(case: Case, warm_up: int, steps: int) -> None:
    """Measure a case in a new process, so that it finds device and host memory free, and print its lines."""
    name = f"{case.name} {case.device_memory} {case.policy:<5} batch {case.batch}"
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            found = pool.submit(measure, case, warm_up, steps).result()
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            return
    seconds = median(found["seconds"])
    memory = " ".join(f"{tier} {found[tier] / 2**30:.2f}" for tier in ("device", "host") if found[tier])
    print(
        f"{name}: {case.batch * SEQUENCE / seconds:.0f} tokens/s, a step {seconds:.3f} s, floor {found['floor']:.3f} s;"
        f" peak GiB: {memory}; ready in {found['ready']:.0f} s;"
        f" losses {' '.join(f'{loss:.4f}' for loss in found['losses'])}",
        flush=True,
    )
    if found["tiers"]:
        tiers = (f"{tier} {count / found['elements']:.2f}" for tier, count in found["tiers"].items())
        print(f"    {found['elements'] / 1e9:.2f}e9 parameters; bytes of each: {', '.join(tiers)}", flush=True)


def machine() -> str:
    """Return a description of the device, the host and the disk of this machine."""
    device = "no GPU"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()} of {torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    disk = shutil.disk_usage(Path(DISK["nvme_dir"]).parent).free / 2**30
    return f"{device}; host: {os.cpu_count()} cores, {host:.0f} GiB; disk: {disk:.0f} GiB; torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"cases that belong together: {', '.join(SETS)}")
    parser.add_argument("--model", choices=SIZES, default="opt-1.3b")
    parser.add_argument("--device-memory", default="6GiB")
    parser.add_argument("--policies", nargs="+", default=["cpu"])
    parser.add_argument("--batches", nargs="+", type=int, default=[16])
    parser.add_argument("--margin", type=float, default=0.8, help="zero.gpu_margin_mem_ratio")
    parser.add_argument("--warm-up", type=int, default=4, help="steps before those that are timed; a plan takes two")
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    arguments = parser.parse_args()
    if unknown := set(arguments.sets) - set(SETS):
        parser.error(f"there is no set {', '.join(unknown)}; the sets are {', '.join(SETS)}")
    print(machine(), flush=True)
    zero = dict(gpu_margin_mem_ratio=arguments.margin)
    cases = [
        Case(arguments.model, arguments.device_memory, policy, batch, zero=zero)
        for policy in arguments.policies
        for batch in arguments.batches
    ]
    for case in [case for name in arguments.sets for case in SETS[name]] if arguments.sets else cases:
        show(case, arguments.warm_up, arguments.steps)


if __name__ == "__main__":
    main()

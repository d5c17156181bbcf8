"""A model trained in bf16 in one process, on the GPU if there is one: by our engine, and as users of torch do it.

Every function takes the work and returns a training step: ids[B, S] on the host -> the mean loss, after one update. All
start from the same fp32 weights, keep fp32 master weights, apply weight decay to matrices only, and clip the norm of
the whole gradient.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.utils import clip_grad_norm_

import models
import parallel
from benchmarks.peers import UnavailableError, adamw, load, shard
from benchmarks.workload import BETAS, CLIP, EPS, WEIGHT_DECAY, Step, graph_bytes
from models.shapes import from_hugging_face, resolve
from training.metrics import peak_device_bytes, peak_tflops

LR = 1e-4  # constant, without a warm-up
ROUNDS = 3
WARM_UP = 6  # steps for compilation, the optimizer's moments, the allocator's blocks, and a CUDA graph of a step


@dataclass(frozen=True)
class Work:
    """The work of a contender: train the Hugging Face model in `folder` on one batch of random tokens, repeatedly."""

    folder: Path
    batch: int
    sequence: int
    steps: int


@dataclass(frozen=True)
class Result:
    """The measurements of a contender: the seconds of a step in each timed round, and the losses of all steps.

    `losses` include those of the warm-up. `peak_bytes` are the most bytes allocated on the device after the warm-up.
    `peak_tflops` is what the device's manufacturer states, or None.
    """

    seconds: list[float]
    losses: list[float]
    peak_bytes: int
    peak_tflops: float | None


def ours(work: Work) -> Step:
    """Train with our engine."""
    return _ours(work)


def ours_compiled(work: Work) -> Step:
    """Train with our engine and `train.compile`."""
    return _ours(work, compile=True)


def ours_fp8(work: Work) -> Step:
    """Train with our engine, linears in 8 bits."""
    return _ours(work, **_in_8_bits())


def ours_fp8_compiled(work: Work) -> Step:
    """Train with our engine, linears in 8 bits, and `train.compile`."""
    return _ours(work, **_in_8_bits(), compile=True)


def _in_8_bits() -> dict[str, Any]:
    """Return the settings of a contender in fp8. On a CPU a model is tiny, and all its linears are in 8 bits."""
    return dict(precision="fp8") if _device().type == "cuda" else dict(precision="fp8", fp8_min_elements=0)


def _ours(work: Work, **train: Any) -> Step:
    config = dict(
        model=dict(path=str(work.folder)),
        data=dict(sequence_length=work.sequence),
        train=dict(global_batch_size=work.batch, micro_batch_size=work.batch, precision="bf16", clip_grad_norm=CLIP)
        | train,
        optimizer=dict(lr=LR, eps=EPS, betas=BETAS, weight_decay=WEIGHT_DECAY),
        lr_scheduler=dict(kind="constant", warmup_steps=0),
    )
    context = parallel.launch_from_torch(config, resolve=resolve)
    engine = parallel.Engine(models.build(context), context)
    return lambda ids: engine.train_step({"input_ids": ids}).loss


def hf(work: Work) -> Step:
    """Train Hugging Face's model in plain torch."""
    model = load(work.folder).to(_device())
    return _with_masters(model, forward=model)


def hf_compiled(work: Work) -> Step:
    """Train Hugging Face's model in plain torch, compiled by `torch.compile`."""
    model = load(work.folder).to(_device())
    return _with_masters(model, forward=torch.compile(model))


def liger(work: Work) -> Step:
    """Train Hugging Face's model with the kernels of liger-kernel (Hsu et al. 2024, arXiv 2410.10989)."""
    model = _with_liger(work)
    return _with_masters(model, forward=model)


def liger_compiled(work: Work) -> Step:
    """Train the same, compiled by `torch.compile`."""
    model = _with_liger(work)
    return _with_masters(model, forward=torch.compile(model))


def _with_liger(work: Work) -> nn.Module:
    if find_spec("liger_kernel") is None:
        raise UnavailableError("liger-kernel is not installed.")
    model: nn.Module = load(work.folder).to(_device())
    family = from_hugging_face(work.folder).model_type
    replace = import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    if family not in replace or _device().type != "cuda":
        raise UnavailableError(f"liger-kernel has no kernels for {family} on {_device().type}.")
    replace[family](model=model)
    return model


def torchao_fp8(work: Work) -> Step:
    """Train Hugging Face's model with torchao's linears in 8 bits, compiled; the head stays in bf16.

    Scales are those of each tensor as it is (tensorwise dynamic scaling), torchao's default.
    """
    if find_spec("torchao") is None:
        raise UnavailableError("torchao is not installed.")
    if _device().type != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        raise UnavailableError("products of 8 bits need a GPU of compute capability 8.9 or newer.")
    convert = import_module("torchao.float8").convert_to_float8_training
    model = load(work.folder).to(_device())
    convert(model, module_filter_fn=lambda module, name: "lm_head" not in name)
    return _with_masters(model, forward=torch.compile(model))


def _with_masters(model: nn.Module, *, forward: Callable[..., Any]) -> Step:
    """Return the training step of a bf16 model whose fp32 master weights are kept apart and rounded into it."""
    masters = [parameter.detach() for parameter in model.parameters()]
    roundings = [parameter.data for parameter in model.to(torch.bfloat16).parameters()]
    optimizer = adamw(masters, lr=LR)

    def step(ids: Tensor) -> float:
        ids = ids.to(_device())
        loss: Tensor = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        for master in masters:
            master.grad = torch.empty_like(master)
        torch._foreach_copy_([m.grad for m in masters], [p.grad for p in model.parameters()])  # type: ignore[misc]
        model.zero_grad()
        clip_grad_norm_(masters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_copy_(roundings, masters)
        return loss.item()

    return step


def fsdp2(work: Work) -> Step:
    """Train under FSDP2 in a world of one: nothing is sharded, but FSDP does mixed precision's casts and copies."""
    device = _device()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    model, mesh = load(work.folder).to(device), init_device_mesh(device.type, (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(model, mesh, mp_policy=policy)
    optimizer = adamw(model.parameters(), lr=LR)

    def step(ids: Tensor) -> float:
        ids = ids.to(device)
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


BUILDS = (
    *(ours, ours_compiled, ours_fp8, ours_fp8_compiled),
    *(hf, hf_compiled, fsdp2, liger, liger_compiled, torchao_fp8),
)
CONTENDERS = {build.__name__: build for build in BUILDS}
IN_8_BITS = frozenset({"ours_fp8", "ours_fp8_compiled", "torchao_fp8"})


def measure(name: str, work: Work) -> Result:
    """Train one contender and measure it; call this in a new process, so that allocator and peaks are its own.

    Every step ends with its loss on the host. As in a run, the device may still be busy with the update when the next
    step begins; at the end of a round it is waited for.
    """
    device, step = _device(), CONTENDERS[name](work)
    generator = torch.Generator().manual_seed(0)
    vocabulary = from_hugging_face(work.folder).vocab_size
    ids = torch.randint(4, vocabulary, (work.batch, work.sequence), generator=generator)
    seconds, losses = [], []
    for steps in (WARM_UP, *[work.steps] * ROUNDS):
        start = time.perf_counter()
        losses += [step(ids) for _ in range(steps)]
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / steps)
        if len(seconds) == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
    return Result(seconds[1:], losses, peak_device_bytes(device) + graph_bytes(device), peak_tflops(device))


def _device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

"""An independent reference, and a run of ours that is compared with it.

The reference is Hugging Face's model with torch's own loss, clipping and AdamW, in one process. It shares no line with
the code that it checks. Whole weights, gradients and moments are compared, under their public names.
"""

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from models import build
from models.hf import export
from models.shapes import resolve, shape_of
from parallel.chunk.chunk import Chunk
from parallel.config import parse
from parallel.engine.base import EngineBase
from parallel.engine.context import Place, make_context
from parallel.engine.engine import Engine
from parallel.layout.layout import Layout, slices
from parallel.mesh.collectives import gather_objects

Batch = dict[str, Tensor]
Raw = dict[str, Any]

SHAPE: Raw = dict(
    vocab_size=37,  # a prime, which no axis divides
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=12,
    ffn_dim=48,
    max_position_embeddings=16,
    dropout=0.0,
)
PROJECTED: Raw = SHAPE | dict(word_embed_proj_dim=12, do_layer_norm_before=False)  # like opt-350m
AnyEngine = TypeVar("AnyEngine", bound=EngineBase)
BOUND = {"fp64": 1e-9, "fp32": 1e-5}


@dataclass
class Trace:
    """The results of a run: loss and gradient norm of each step, and whole public tensors by name."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)  # of the first step, clipped
    weights: dict[str, Tensor] = field(default_factory=dict)  # after the last step


def config_of(parallel: Raw, *, steps: int = 4, precision: str = "fp64", **sections: Any) -> Raw:
    """Return a raw config for a comparison: clipping is active, decay is strong, and the warm-up ends during the run.

    With Adam's usual eps of 1e-8 a gradient that is rounding noise moves its element by a whole lr: in fp32 Hugging
    Face's own weights are then 7e-6 from fp64's, while gradients agree to 1e-6 everywhere. 1e-6 is above that noise.
    """
    base: Raw = dict(
        parallel=parallel,
        data=dict(sequence_length=6),
        train=dict(steps=steps, global_batch_size=12, micro_batch_size=4, precision=precision, clip_grad_norm=0.5)
        | dict(fp8_min_elements=0),
        optimizer=dict(lr=1e-2, weight_decay=0.1, eps=1e-6),
        lr_scheduler=dict(warmup_steps=2),
    )
    for name, section in sections.items():
        base[name] = base.get(name, {}) | section
    return base


def batches_of(count: int, *, batch: int = 12, sequence: int = 6, vocabulary: int = 37, seed: int = 0) -> list[Batch]:
    """Return batches of random tokens; each contains the padding token 1."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(0, vocabulary, (batch, sequence), generator=generator)
        ids[:, 2] = torch.where(torch.arange(batch) % 3 == 0, 1, ids[:, 2])
        found.append(dict(input_ids=ids))
    return found


def padded(batches: list[Batch]) -> list[Batch]:
    """Return the samples padded on the left, on the right, and not at all. One sample has a single label."""
    found = []
    for batch in batches:
        mask = torch.ones_like(batch["input_ids"])
        mask[0::3, :2] = 0
        mask[1::3, 4:] = 0
        labels = batch["input_ids"].masked_fill(mask == 0, -100)
        labels[5, 2:] = -100
        found.append(dict(input_ids=batch["input_ids"].masked_fill(mask == 0, 1), attention_mask=mask, labels=labels))
    return found


def save_model(folder: Path, family: str = "opt", **shape: Any) -> Path:
    """Save a Hugging Face model in which no weight is zero or one, biases and the padding row included.

    All weights are exact in every precision, so that errors come from arithmetic alone. `family`: its model_type.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith(".weight")  # weights of norms are around one
            parameter.normal_(0, 0.2).add_(is_norm)
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)
    return folder


def hugging_face(path: Path, dtype: torch.dtype) -> Any:
    """Return the Hugging Face model of a folder, each of its RMSNorms replaced by torch's with the same weight and eps.

    Hugging Face's own computes in fp32, in an fp64 model too. Attention is torch's, to which a row of padding sees no
    token; Hugging Face's eager attention lets it see all of them.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    for name, norm in [(name, part) for name, part in model.named_modules() if type(part).__name__.endswith("RMSNorm")]:
        (size,) = norm.weight.shape
        replaced = torch.nn.RMSNorm(size, norm.variance_epsilon, dtype=dtype)
        replaced.weight = norm.weight
        model.set_submodule(name, replaced)
    if torch.cuda.is_available():
        for rotary in [part for part in model.modules() if type(part).__name__.endswith("RotaryEmbedding")]:
            compute_on_gpu(rotary)
    return model


def named_as_in_files(model: Any) -> dict[str, Any]:
    """Return the parameters of a Hugging Face model by the names under which it saves them.

    Those of some classes are called otherwise in the files: GPT-NeoX's lm_head is embed_out there.
    """
    from transformers.core_model_loading import revert_weight_conversion

    named = dict(model.named_parameters())
    saved: dict[str, Any] = revert_weight_conversion(model, dict(named))
    assert {id(parameter) for parameter in saved.values()} == {id(parameter) for parameter in named.values()}
    return saved


def compute_on_gpu(rotary: torch.nn.Module) -> None:
    """Make a Hugging Face module compute its cosines and sines where ours are computed.

    They are fp32 in an fp64 model, too, and a GPU's last bit of a cosine is not a CPU's.
    """
    forward = rotary.to("cuda").forward

    def tables(x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(table.cpu() for table in forward(x[:0].cuda(), position_ids.cuda()))

    rotary.forward = tables


@torch.no_grad()
def mean_loss(model: Any, batches: list[Batch]) -> float:
    """Return a Hugging Face model's loss, the mean over all labels of all batches."""
    total, count = 0.0, 0
    for batch in batches:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"][:, 1:].flatten()
        total += F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


def loss_of_batch(model: Any, batch: Batch) -> Tensor:
    """Return a Hugging Face model's loss, the mean over all labels of a batch."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    labels = batch.get("labels", ids)
    logits = model(ids, attention_mask=mask, position_ids=batch.get("position_ids")).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def reference(
    path: Path, raw: Raw, batches: list[Batch], loss_of: Callable[[Any, Batch], Tensor] = loss_of_batch
) -> Trace:
    """Train Hugging Face's model in one process, with the same weights, tokens and hyperparameters."""
    config = parse(raw)
    dtype = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[config.train.precision]
    model = hugging_face(path, dtype).train()
    named = named_as_in_files(model)
    matrices = [p for p in named.values() if p.ndim >= 2]
    others = [p for p in named.values() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=config.optimizer.weight_decay), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=config.optimizer.betas, eps=config.optimizer.eps)
    trace = Trace()
    for step, batch in enumerate(batches):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        clip = config.train.clip_grad_norm or math.inf
        trace.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        trace.losses.append(loss.item())
        if step == 0:
            trace.gradients = {name: p.grad.clone() for name, p in named.items()}
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(raw, step)
        optimizer.step()
    trace.weights = {name: p.detach().clone() for name, p in named.items()}
    return trace


def _learning_rate(raw: Raw, k: int) -> float:
    """Return the learning rate of step k by the formula of docs/data.md, written independently."""
    lr: float = raw["optimizer"]["lr"]
    w: int = raw["lr_scheduler"]["warmup_steps"]
    steps: int = raw["train"]["steps"]
    if k < w:
        return lr * (k + 1) / w
    t = (k - w) / max(1, steps - w)
    return lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * t)))


def train(rank: int, world_size: int, raw: Raw, batches: list[Batch]) -> Trace | None:
    """Train with our engine on this rank; rank 0 returns the trace, with whole tensors."""
    return traced(engine_of(rank, world_size, raw), batches)


def traced(engine: Engine, batches: list[Batch]) -> Trace | None:
    """Train with this engine, which is closed then; rank 0 returns the trace, with whole tensors."""
    trace, update = Trace(), engine.optimizer.step

    def observed(factor: Tensor, lr: float, found_inf: Tensor | None = None) -> None:
        if engine.num_steps == 0:
            trace.gradients = whole(engine, [clipped(chunk, factor) for chunk in engine.chunks])
        update(factor, lr, found_inf)

    engine.optimizer.step = observed  # type: ignore[method-assign]
    for batch in batches:
        result = engine.train_step(share_of(batch, engine))
        trace.losses.append(result.loss)
        assert result.grad_norm is not None
        trace.norms.append(result.grad_norm)
    whole(engine, [chunk.master for chunk in engine.chunks])
    trace.weights = exported(engine)
    engine.mesh.close()
    return trace if engine.mesh.rank == 0 else None


def clipped(chunk: Chunk, factor: Tensor) -> Tensor:
    """Return the clipped gradient of a chunk, a flat buffer."""
    assert chunk.gradient.total is not None
    chunk.settle()
    return chunk.gradient.total.to(factor.device, chunk.master.dtype) * factor.to(chunk.master.dtype)


def exported(engine: Engine) -> dict[str, Tensor]:
    """Export a Hugging Face directory, and return the weights that rank 0 reads from it."""
    world, config = engine.mesh.world, engine.config
    is_first = world.rank == 0
    folder = Path(gather_objects(tempfile.mkdtemp() if is_first else None, world)[0])
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    export(folder / "export", engine.weights(), shape=shape_of(config), axis=world, dtype=dtype)
    found = load_file(folder / "export" / "model.safetensors") if is_first else {}
    if is_first:
        shutil.rmtree(folder)
    return found


def engine_of(rank: int, world_size: int, raw: Raw) -> Engine:
    """Build the model and the engine of a raw config on this rank."""
    config = parse(raw, world_size=world_size, resolve=resolve)
    context = make_context(config, Place(rank, world_size, rank, world_size))
    torch.set_num_threads(1)
    return updating_on_device(Engine(build(context), context))


def updating_on_device(engine: AnyEngine) -> AnyEngine:
    """Make an engine on a GPU update everything there, and return it.

    The host's AdamW rounds in another way, and runs with other placements are compared bit for bit.
    """
    if engine.mesh.device.type == "cuda":
        engine.optimizer.host_share = 0.0
    return engine


def share_of(batch: Mapping[str, Tensor], engine: Engine) -> Batch:
    """Return this replica's samples, a contiguous part of the global batch."""
    return {name: x.tensor_split(engine.data.size)[engine.data.rank] for name, x in batch.items()}


def whole(engine: EngineBase, buffers: list[Tensor]) -> dict[str, Tensor]:
    """Join the public tensors of all ranks, from a flat buffer for each chunk.

    Each element must have exactly one owner, and ranks that hold the same elements must agree to the last bit.
    """
    for chunk in engine.chunks:
        chunk.settle()  # copies of masters on a host may still be in flight
    pieces = [
        (piece.name, piece.shape, piece.box, piece.data.double().cpu().numpy(), chunk.spec.is_owner)
        for chunk, flat in zip(engine.chunks, buffers, strict=True)
        for piece in chunk.spec.pieces(flat)
    ]
    all_pieces = [piece for part in gather_objects(pieces, engine.mesh.world) for piece in part]
    found: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    for name, shape, box, data, owner in all_pieces:
        if owner:
            found.setdefault(name, np.full(shape, np.nan))[slices(box)] = data
            counts.setdefault(name, np.zeros(shape))[slices(box)] += 1
    for name, count in counts.items():
        assert (count == 1).all(), f"{name}: an element has {count.min():.0f} to {count.max():.0f} owners"
    for name, _, box, data, _ in all_pieces:
        assert np.array_equal(found[name][slices(box)], data), f"{name}{box}: replicas differ"
    return {name: torch.from_numpy(data) for name, data in found.items()}


def owns(layout: Layout) -> bool:
    """Return whether this rank is the first of the ranks that hold the same elements."""
    return all(axis.rank == 0 for axis in (*layout.sync, *layout.copies))


def relative(got: Tensor, want: Tensor) -> float:
    """Return the Frobenius norm of the difference, relative to the norm of `want`."""
    difference = (got.double() - want.double()).norm()
    return float(difference / want.double().norm()) if difference else 0.0  # both may be zero


def assert_bits(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """Assert that tensors are equal to the last bit, on any devices."""
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert torch.equal(got[name].cpu(), x.cpu()), name


def assert_same_update(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """Assert that fp64 tensors are equal, one updated on the host and the other on the device.

    They are equal to the last bit, or nearly so if the device is a GPU, whose AdamW rounds in another way.
    """
    if torch.cuda.is_available():
        torch.testing.assert_close(dict(got), dict(want), rtol=1e-9, atol=1e-12, check_device=False)
    else:
        assert_bits(got, want)


def compare(got: Trace, want: Trace, bound: float, *, is_fp64: bool) -> None:
    """Assert that the error of every loss, norm, gradient and weight is within the bound, relative to its own norm.

    A gradient that is zero, or nearly so, in exact arithmetic because large terms cancel (the bias of k always, unless
    rotary positions turn k; q and k where every label sees few tokens) is rounding noise. So an error of four units in
    the last place of the whole gradient's norm is allowed beside the bound. Below fp64 (not `is_fp64`) Adam turns such
    noise into whole steps, of which a weight that began at zero then consists: so the bias of k, and other weights
    whose gradient was noise, are not compared.
    """
    for name, ours, theirs in (("loss", got.losses, want.losses), ("norm", got.norms, want.norms)):
        assert len(ours) == len(theirs)
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert abs(a - b) <= bound * abs(b), f"{name} of step {step + 1}: {a!r}, wanted {b!r}"
    assert got.weights.keys() == want.weights.keys()
    assert got.gradients.keys() == want.gradients.keys()
    noise = _noise(want, torch.float64 if bound < 1e-8 else torch.float32)
    found, exact = _separated(got), _separated(want)
    for name, gradient in exact.gradients.items():
        norm = gradient.double().norm().item()
        difference = (found.gradients[name].double() - gradient.double()).norm().item()
        assert difference <= bound * norm + noise, (
            f"gradient of {name}: off by {difference:.1e}, of a norm of {norm:.1e}"
        )
    for name, weight in exact.weights.items():
        if is_fp64 or not _has_only_noise(exact, name, noise):
            error = relative(found.weights[name], weight)
            assert error <= bound, f"weight {name}: {error:.1e}"


def distance(got: Trace, want: Trace) -> float:
    """Return the smallest bound with which `compare` accepts an fp32 trace beside the exact one."""
    pairs = [*zip(got.losses, want.losses, strict=True), *zip(got.norms, want.norms, strict=True)]
    found = [abs(a - b) / abs(b) for a, b in pairs]
    noise = _noise(want, torch.float32)
    got, want = _separated(got), _separated(want)
    for name, gradient in want.gradients.items():
        difference = (got.gradients[name].double() - gradient.double()).norm().item()
        found.append(max(0.0, difference - noise) / max(gradient.double().norm().item(), noise))
    found += [
        relative(got.weights[n], weight) for n, weight in want.weights.items() if not _has_only_noise(want, n, noise)
    ]
    return max(found)


def _separated(trace: Trace) -> Trace:
    """Return the trace with the biases of q, k and v, which are one vector in GPT-2, under a name each.

    The gradient of k's part is noise: it would be hidden by the others' in a gradient, and would spoil the weights.
    """

    def separated(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = dict(tensors)
        for name in [name for name in tensors if name.endswith(".c_attn.bias")]:
            parts = found.pop(name).chunk(3)
            found |= {name.replace("c_attn", f"{part}_proj"): x for part, x in zip("qkv", parts, strict=True)}
        return found

    return Trace(trace.losses, trace.norms, separated(trace.gradients), separated(trace.weights))


def _has_only_noise(want: Trace, name: str, noise: float) -> bool:
    """Return whether a parameter's gradient was rounding noise.

    The bias of k adds one number to all scores of a query, which its softmax does not see. Rotary positions turn it,
    and the number is another one for each key: in the families that have them the bias is compared as any other.
    """
    gradient = want.gradients.get(name)
    is_turned = name.startswith("model.layers.")  # a name of a family with rotary positions
    return (name.endswith("k_proj.bias") and not is_turned) or (
        gradient is not None and gradient.double().norm().item() <= noise
    )


def _noise(want: Trace, dtype: torch.dtype) -> float:
    """Return the norm that rounding may give to a gradient that is zero: four units in the last place."""
    total = math.sqrt(sum(g.double().square().sum().item() for g in want.gradients.values()))
    return 4 * torch.finfo(dtype).eps * total

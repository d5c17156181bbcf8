"""The sizes at which `benchmarks.kernels` measures, and the random inputs of a kernel for a size and a seed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from models.family import named_sizes
from models.shape import ModelShape
from parallel.ops.fp8 import E4M3

Inputs = tuple[Tensor, ...]
Draw = Callable[["Size", torch.device, int], Inputs]

BF16 = torch.bfloat16
LOSS_TOKENS = 2048  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Size:
    """The size of the tensor that a kernel reads most of."""

    rows: int
    columns: int


@dataclass(frozen=True)
class Model:
    """A model at whose sizes kernels are measured, and the tokens of a step."""

    name: str
    tokens: int

    @property
    def shape(self) -> ModelShape:
        return named_sizes()[self.name]

    @property
    def inner(self) -> int:
        """The width of the feed-forward."""
        return next(iter(self.shape.inner_widths().values()))

    @property
    def has_rms_norm(self) -> bool:
        """True in the families of Llama: RMSNorm, rotary positions, SwiGLU; the others have biases."""
        return self.shape.positions is None


MODELS = (Model("opt-1.3b", 8 * 1024), Model("opt-125m", 32 * 1024), Model("llama-3.2-1b", 8 * 1024))


# -- sizes -------------------------------------------------------------------------------------------------------------


def hidden(model: Model) -> Size:
    return Size(model.tokens, model.shape.hidden_size)


def hidden_of_layer_norm(model: Model) -> Size | None:
    return None if model.has_rms_norm else hidden(model)


def hidden_of_rms_norm(model: Model) -> Size | None:
    return hidden(model) if model.has_rms_norm else None


def inner_with_bias(model: Model) -> Size | None:
    return None if model.has_rms_norm else Size(model.tokens, model.inner)


def inner_gated(model: Model) -> Size | None:
    return Size(model.tokens, model.inner) if model.has_rms_norm else None


def heads_of_rotary(model: Model) -> Size | None:
    return _heads(model) if model.has_rms_norm else None


def heads_of_biases(model: Model) -> Size | None:
    return None if model.has_rms_norm else _heads(model)


def _heads(model: Model) -> Size:
    """Return the size of the joint output of q's, k's and v's linear."""
    shape = model.shape
    return Size(model.tokens, (shape.num_attention_heads + 2 * shape.num_kv_heads) * shape.head_size)


def block(model: Model) -> Size:
    """Return the elements of a block's matrices, which are in one chunk."""
    matrices = [size for size in model.shape.block_tensors(0).values() if len(size) == 2]
    return Size(1, sum(rows * columns for rows, columns in matrices))


def logits(model: Model) -> Size:
    return Size(LOSS_TOKENS, model.shape.vocab_size)


# -- inputs ------------------------------------------------------------------------------------------------------------


def draws(*tensors: str) -> Draw:
    """Return a function that draws these tensors in bf16, or in 8 bits if they are "narrow".

    A "matrix" or a "narrow" one is [rows, columns], a "pair" [rows, 2 · columns], and a "vector" [columns].
    """

    def draw(size: Size, device: torch.device, seed: int) -> Inputs:
        normal, vector = _normal(device, seed), (size.columns,)
        matrix = size.rows, size.columns
        shapes = dict(matrix=matrix, narrow=matrix, pair=(size.rows, 2 * size.columns), vector=vector)
        return tuple(normal(*shapes[name]).to(E4M3 if name == "narrow" else BF16) for name in tensors)

    return draw


TABLE_ROWS = 4
"""The rows of the table of a lookup, for each token."""


def draw_lookup(size: Size, device: torch.device, seed: int, *, gradient: bool = False) -> Inputs:
    """Draw table[4 · rows, columns] and indices[rows], and with `gradient` that of the result[rows, columns]."""
    normal = _normal(device, seed)
    table = normal(TABLE_ROWS * size.rows, size.columns).to(BF16)
    indices = (normal(size.rows).abs() * size.rows).long() % len(table)
    return (table, indices, normal(size.rows, size.columns).to(BF16)) if gradient else (table, indices)


def draw_update(size: Size, device: torch.device, seed: int, *, moments: torch.dtype) -> Inputs:
    """Draw gradient[n] and parameter[n] in bf16, master[n] in fp32, and both moments[n], the second one positive."""
    normal = _normal(device, seed)
    gradient, master, first, second = (normal(size.columns) for _ in range(4))
    return gradient.to(BF16), master.to(BF16), master, first.to(moments), second.square_().to(moments)


GROUP = 4  # q heads of a k, v head, where they share one


def draw_heads(size: Size, device: torch.device, seed: int, *, rotary: bool = False, gradients: bool = False) -> Inputs:
    """Draw qkv[1, rows, columns], the joint output of q's, k's and v's linear.

    With `rotary` GROUP heads of q share one of k and v, and cosines and sines[1, 1, rows, D] follow. With `gradients`
    those of q, k and v[1, heads, rows, D] follow, as attention leaves them.
    """
    normal, group = _normal(device, seed), GROUP if rotary else 1
    width = 64 if size.columns % (64 * (group + 2)) == 0 else size.columns // (group + 2)
    count = size.columns // width // (group + 2)
    found = [normal(1, size.rows, size.columns).to(BF16)]
    if rotary:
        angles = torch.arange(size.rows, device=device)[:, None] * normal(width // 2)
        angles = torch.cat((angles, angles), -1)[None, None]
        found += [angles.cos().to(BF16), angles.sin().to(BF16)]
    if gradients:
        counts = group * count, count, count
        found += [normal(1, size.rows, heads, width).to(BF16).transpose(1, 2) for heads in counts]
    return tuple(found)


def draw_logits(size: Size, device: torch.device, seed: int) -> Inputs:
    """Draw logits[rows, columns] in fp32, as the head's product leaves them, and labels[rows]."""
    normal = _normal(device, seed)
    return normal(size.rows, size.columns), (normal(size.rows).abs() * size.columns).long() % size.columns


def _normal(device: torch.device, seed: int) -> Callable[..., Tensor]:
    return partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(seed))

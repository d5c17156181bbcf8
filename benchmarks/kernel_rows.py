"""The rows of `benchmarks.kernels`: every fused kernel, what it moves, and the functions that compute the same.

A contender prepares a call for its inputs: what it does before, a forward whose backward is measured, is not timed. A
call returns its results, so that they can be compared.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import kernel_ours as ours
from benchmarks import kernel_peers as peers
from benchmarks.kernel_inputs import (
    TABLE_ROWS,
    Draw,
    Model,
    Size,
    block,
    draw_heads,
    draw_logits,
    draw_lookup,
    draw_update,
    draws,
    heads_of_biases,
    heads_of_rotary,
    hidden,
    hidden_of_layer_norm,
    hidden_of_rms_norm,
    inner_gated,
    inner_with_bias,
    logits,
)
from parallel.ops.kernels.activation import activated, gated
from parallel.ops.kernels.cast import transposed
from parallel.ops.kernels.column_sum import column_sum
from parallel.ops.kernels.fingerprint import fingerprint, fingerprints_in_torch
from parallel.ops.kernels.sums import sums_of_squares

Call = Callable[[], Any]
Prepare = Callable[..., Call]


@dataclass(frozen=True)
class Row:
    """A kernel.

    kernel             its row in the table of kernels
    size               of the kernel in a model; None: the model does not call it
    bytes_per_element  read once and written once, for each element of rows × columns
    draw               the inputs for a size, a device and a seed
    contenders         "ours", "torch" and "liger"; one that is missing has no such function
    is_random          results differ by what is drawn, and are not compared
    """

    name: str
    kernel: str
    size: Callable[[Model], Size | None]
    bytes_per_element: float
    draw: Draw
    contenders: Mapping[str, Prepare]
    is_random: bool = False


def forward(function: Callable[..., Any]) -> Prepare:
    """Return the contender that calls a function, which has no gradient."""

    def prepare(*inputs: Tensor) -> Call:
        def call() -> Any:
            with torch.no_grad():
                return function(*inputs)

        return call

    return prepare


def backward(function: Callable[..., Any], *, outputs: int = 1, leaves: int | None = None) -> Prepare:
    """Return the contender that differentiates a function: the last `outputs` inputs are its outputs' gradients.

    Only the first `leaves` of the others have gradients; None: all of them.
    """

    def prepare(*inputs: Tensor) -> Call:
        given = inputs[:-outputs]
        differentiated = [x.requires_grad_() for x in given[:leaves]]
        y = function(*given)
        return partial(torch.autograd.grad, y, differentiated, inputs[-outputs:], retain_graph=True)

    return prepare


COPY = Row("copy", "", block, 4, draws("vector"), {"torch": forward(torch.clone)})
"""The measure of all others: what a copy moves in a second."""

ROWS = (
    Row(
        "AdamW, fp32 states",
        "adamw",
        block,
        2 + 3 * 4 + 3 * 4 + 2,
        partial(draw_update, moments=torch.float32),
        {"ours": forward(ours.update), "torch": forward(peers.torch_update)},
    ),
    Row(
        "AdamW, bf16 states",
        "adamw",
        block,
        2 + (4 + 2 + 2) + (4 + 2 + 2) + 2,
        partial(draw_update, moments=torch.bfloat16),
        {"ours": forward(ours.update), "torch": forward(peers.torch_update)},
    ),
    Row(
        "sum of squares",
        "sums",
        block,
        2,
        draws("vector"),
        {"ours": forward(lambda x: sums_of_squares([x])[0]), "torch": forward(peers.torch_squares)},
    ),
    Row(
        "LayerNorm",
        "norm",
        hidden_of_layer_norm,
        2 + 2,
        draws("matrix", "vector", "vector"),
        {
            "ours": forward(ours.layer_norm),
            "torch": forward(peers.torch_layer_norm),
            "liger": forward(peers.liger_layer_norm),
        },
    ),
    Row(
        "LayerNorm backward",
        "norm",
        hidden_of_layer_norm,
        4 + 2,
        draws("matrix", "vector", "vector", "matrix"),
        {
            "ours": backward(ours.layer_norm),
            "torch": backward(peers.torch_layer_norm),
            "liger": backward(peers.liger_layer_norm),
        },
    ),
    Row(
        "add + LayerNorm",
        "norm",
        hidden_of_layer_norm,
        4 + 4,
        draws("matrix", "matrix", "vector", "vector"),
        {"ours": forward(ours.add_layer_norm), "torch": forward(peers.torch_add_layer_norm)},
    ),
    Row(
        "dropout + add + LayerNorm",
        "norm",
        hidden_of_layer_norm,
        4 + 4,
        draws("matrix", "matrix", "vector", "vector"),
        {
            "ours": forward(partial(ours.add_layer_norm, dropout=0.1)),
            "torch": forward(partial(peers.torch_add_layer_norm, dropout=0.1)),
        },
        is_random=True,
    ),
    Row(
        "add + LayerNorm backward",
        "norm",
        hidden_of_layer_norm,
        6 + 2,
        draws("matrix", "matrix", "vector", "vector", "matrix", "matrix"),
        {"ours": backward(ours.add_layer_norm, outputs=2), "torch": backward(peers.torch_add_layer_norm, outputs=2)},
    ),
    Row(
        "RMSNorm",
        "norm",
        hidden_of_rms_norm,
        2 + 2,
        draws("matrix", "vector"),
        {
            "ours": forward(ours.rms_norm),
            "torch": forward(peers.torch_rms_norm),
            "liger": forward(peers.liger_rms_norm),
        },
    ),
    Row(
        "RMSNorm backward",
        "norm",
        hidden_of_rms_norm,
        4 + 2,
        draws("matrix", "vector", "matrix"),
        {
            "ours": backward(ours.rms_norm),
            "torch": backward(peers.torch_rms_norm),
            "liger": backward(peers.liger_rms_norm),
        },
    ),
    Row(
        "add + RMSNorm",
        "norm",
        hidden_of_rms_norm,
        4 + 4,
        draws("matrix", "matrix", "vector"),
        {
            "ours": forward(ours.add_rms_norm),
            "torch": forward(peers.torch_add_rms_norm),
            "liger": forward(peers.liger_add_rms_norm),
        },
    ),
    Row(
        "add + RMSNorm backward",
        "norm",
        hidden_of_rms_norm,
        6 + 2,
        draws("matrix", "matrix", "vector", "matrix", "matrix"),
        {
            "ours": backward(ours.add_rms_norm, outputs=2),
            "torch": backward(peers.torch_add_rms_norm, outputs=2),
            "liger": backward(peers.liger_add_rms_norm, outputs=2),
        },
    ),
    Row(
        "bias + relu",
        "activation",
        inner_with_bias,
        2 + 2,
        draws("matrix", "vector"),
        {
            "ours": forward(lambda x, bias: activated(x, "relu", bias)),
            "torch": forward(lambda x, bias: F.relu(x + bias)),
        },
    ),
    Row(
        "bias + relu backward",
        "activation",
        inner_with_bias,
        4 + 2,
        draws("matrix", "vector", "matrix"),
        {
            "ours": backward(lambda x, bias: activated(x, "relu", bias)),
            "torch": backward(lambda x, bias: F.relu(x + bias)),
        },
    ),
    Row(
        "bias + gelu",
        "activation",
        inner_with_bias,
        2 + 2,
        draws("matrix", "vector"),
        {
            "ours": forward(lambda x, bias: activated(x, "gelu", bias)),
            "torch": forward(lambda x, bias: F.gelu(x + bias)),
        },
    ),
    Row(
        "bias + gelu backward",
        "activation",
        inner_with_bias,
        4 + 2,
        draws("matrix", "vector", "matrix"),
        {
            "ours": backward(lambda x, bias: activated(x, "gelu", bias)),
            "torch": backward(lambda x, bias: F.gelu(x + bias)),
        },
    ),
    Row(
        "SwiGLU",
        "activation",
        inner_gated,
        4 + 2,
        draws("pair"),
        {
            "ours": forward(lambda pair: gated(pair, "silu")),
            "torch": forward(peers.torch_swiglu),
            "liger": forward(peers.liger_swiglu),
        },
    ),
    Row(
        "SwiGLU backward",
        "activation",
        inner_gated,
        (2 + 4) + 4,
        draws("pair", "matrix"),
        {
            "ours": backward(lambda pair: gated(pair, "silu")),
            "torch": backward(peers.torch_swiglu),
            "liger": backward(peers.liger_swiglu),
        },
    ),
    Row(
        "rotary of q, k",
        "heads",
        heads_of_rotary,
        2 + 2,  # v is moved too, so that the joint output is freed; it stays there in torch and Liger-Kernel
        partial(draw_heads, rotary=True),
        {"ours": forward(ours.rotary), "torch": forward(peers.torch_rotary), "liger": forward(peers.liger_rotary)},
    ),
    Row(
        "rotary of q, k backward",
        "heads",
        heads_of_rotary,
        2 + 2,
        partial(draw_heads, rotary=True, gradients=True),
        {
            "ours": backward(ours.rotary, outputs=3, leaves=1),
            "torch": backward(peers.torch_rotary, outputs=3, leaves=1),
            "liger": backward(peers.liger_rotary, outputs=3, leaves=1),
        },
    ),
    Row(
        "heads of q, k, v backward",
        "heads",
        heads_of_biases,
        2 + 2,
        partial(draw_heads, gradients=True),
        {"ours": backward(ours.heads, outputs=3), "torch": backward(peers.torch_heads, outputs=3)},
    ),
    Row(
        "column sum",
        "column_sum",
        hidden_of_layer_norm,
        2,
        draws("matrix"),
        {"ours": forward(column_sum), "torch": forward(lambda x: x.sum(0))},
    ),
    Row(
        "bf16 gradient to fp32",
        "accumulate",
        hidden,
        2 + 4,
        draws("matrix"),
        {"ours": forward(ours.to_fp32), "torch": forward(lambda x: x.float())},
    ),
    Row(
        "cross entropy",
        "cross_entropy",
        logits,
        4 + 2,
        draw_logits,
        {
            "ours": forward(ours.loss_and_gradient),
            "torch": forward(peers.torch_cross_entropy),
            "liger": forward(peers.liger_cross_entropy),
        },
    ),
    Row(
        "cast to fp8",
        "cast",
        hidden,
        2 + 1,
        draws("matrix"),
        {"ours": forward(ours.cast_flat), "torch": forward(peers.torch_cast)},
    ),
    Row(
        "cast to fp8 and transpose",
        "cast",
        hidden,
        2 + 2,
        draws("matrix"),
        {"ours": forward(ours.cast_both_ways), "torch": forward(peers.torch_cast_and_transpose)},
    ),
    Row(
        "transpose of fp8",
        "transpose",
        hidden,
        1 + 1,
        draws("narrow"),
        {"ours": forward(transposed), "torch": forward(peers.torch_transpose)},
    ),
    Row(
        "lookup",
        "lookup",
        hidden,
        2 + 2,
        draw_lookup,
        {"ours": forward(ours.lookup_of), "torch": forward(peers.torch_lookup)},
    ),
    Row(
        "lookup backward",
        "lookup",
        hidden,
        2 + 2 * TABLE_ROWS,
        partial(draw_lookup, gradient=True),
        {"ours": backward(ours.lookup_of, leaves=1), "torch": backward(peers.torch_lookup, leaves=1)},
    ),
    Row(
        "multiplication in place",
        "multiply",
        block,
        2 + 2,
        draws("vector"),
        {"ours": forward(ours.multiply), "torch": forward(peers.torch_multiply)},
    ),
    Row(
        "fingerprint",
        "fingerprint",
        block,
        2,
        draws("vector"),
        {"ours": forward(fingerprint), "torch": forward(lambda x: fingerprints_in_torch([x])[0])},
    ),
)

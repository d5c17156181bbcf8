"""The functions of torch and of Liger-Kernel that compute what the kernels of `benchmarks.kernels` do."""

from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from benchmarks.kernel_inputs import BF16, GROUP, Inputs
from benchmarks.workload import BETAS, EPS, WEIGHT_DECAY

FACTOR, SCALE = 0.5, 4.0
"""The numbers by which gradients are clipped, and by which a tensor is multiplied before it is cast to 8 bits."""

# -- torch's own -------------------------------------------------------------------------------------------------------


def torch_update(gradient: Tensor, parameter: Tensor, *states: Tensor) -> Inputs:
    """Update by torch's fused kernel, with the passes around it: widen, clip, and round into the parameter."""
    master, *moments = states
    wide = gradient.float().mul_(FACTOR)
    first, second = (moment.float() for moment in moments)
    step = [torch.ones((), device=master.device)]
    update: Any = adamw
    settings = dict(lr=1e-4, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=WEIGHT_DECAY)
    update([master], [wide], [first], [second], [], step, fused=True, amsgrad=False, maximize=False, **settings)
    for moment, updated in zip(moments, (first, second), strict=True):
        if moment.dtype != updated.dtype:
            moment.copy_(updated)
    parameter.copy_(master)
    return parameter, master, *moments


def torch_squares(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float32)
    return norm.square()


def torch_multiply(x: Tensor) -> Tensor:
    return x.mul_(FACTOR)


def torch_lookup(table: Tensor, indices: Tensor) -> Tensor:
    return F.embedding(indices, table)


def torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-5)


def torch_add_layer_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, *, dropout: float = 0.0) -> Inputs:
    total = x + F.dropout(y, dropout)
    return torch_layer_norm(total, weight, bias), total


def torch_add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, *, dropout: float = 0.0) -> Inputs:
    total = x + F.dropout(y, dropout)
    return torch_rms_norm(total, weight), total


def torch_swiglu(pair: Tensor) -> Tensor:
    gate, up = pair.chunk(2, -1)
    return F.silu(gate) * up


def torch_heads(qkv: Tensor) -> Inputs:
    """Return q, k and v[1, heads, S, 64], views of their linear's joint output."""
    width = 64 if qkv.shape[-1] % 192 == 0 else qkv.shape[-1] // 3
    return tuple(part.unflatten(-1, (-1, width)).transpose(1, 2) for part in qkv.chunk(3, -1))


def torch_rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> Inputs:
    """Return q and k, turned by their positions, and v."""
    q, k, v = grouped_heads(qkv, cos.shape[-1])
    return _turned(q, cos, sin), _turned(k, cos, sin), v


def grouped_heads(qkv: Tensor, width: int) -> Inputs:
    """Return q, k and v[1, heads, S, D] of a joint output in which they follow one another in each group."""
    groups = qkv.unflatten(-1, (-1, GROUP + 2, width))
    q, k, v = groups.split([GROUP, 1, 1], -2)
    return tuple(x.flatten(2, 3).transpose(1, 2) for x in (q, k, v))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def torch_cross_entropy(logits: Tensor, labels: Tensor) -> Inputs:
    """Return the sum of the losses, and its gradient by the logits in bf16."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        loss = F.cross_entropy(leaf, labels, reduction="sum")
        return loss.detach(), torch.autograd.grad(loss, leaf)[0].to(BF16)


def torch_cast(x: Tensor) -> Tensor:
    """Return the numbers in 8 bits. The largest magnitude, which the next steps' scale needs, is computed, too."""
    x.abs().amax()
    return (x * SCALE).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def torch_cast_and_transpose(x: Tensor) -> Inputs:
    narrow = torch_cast(x)
    return narrow, narrow.t().contiguous()


def torch_transpose(x: Tensor) -> Tensor:
    return x.view(torch.uint8).t().contiguous().view(x.dtype)


# -- Liger-Kernel's ----------------------------------------------------------------------------------------------------


def liger_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
    return _apply("layer_norm.LigerLayerNormFunction", x, weight, bias, 1e-5)


def liger_rms_norm(x: Tensor, weight: Tensor) -> Any:
    """Normalize; the gradient gets memory of its own, since the call is repeated."""
    return _apply("rms_norm.LigerRMSNormFunction", x, weight, 1e-5, 0.0, "llama", False)


def liger_add_rms_norm(x: Tensor, y: Tensor, weight: Tensor) -> Any:
    return _apply("fused_add_rms_norm.LigerFusedAddRMSNormFunction", x, y, weight, 1e-5, 0.0, "llama", False)


def liger_swiglu(pair: Tensor) -> Any:
    return _apply("swiglu.LigerFusedGateUpSiLUMulFunction", pair, False)


def liger_rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> Inputs:
    q, k, v = grouped_heads(qkv, cos.shape[-1])
    return *_apply("rope.LigerRopeFunction", q, k, cos, sin)[:2], v


def liger_cross_entropy(logits: Tensor, labels: Tensor) -> Inputs:
    """Return the sum of the losses, and its gradient by the logits, written over them in fp32."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        loss = _apply("cross_entropy.LigerCrossEntropyFunction", leaf, labels, None, -100, 0.0, 0.0, "sum")[0]
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def _apply(name: str, *arguments: object) -> Any:
    module, _, function = name.partition(".")
    return getattr(import_module(f"liger_kernel.ops.{module}"), function).apply(*arguments)

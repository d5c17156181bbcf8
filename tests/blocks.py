"""Blocks of the families with the kernels of activations and heads are as exact as with torch's functions.

On a GPU `test_pointwise.py` compares the same blocks, in which the kernels are chosen as they are in a training.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from models.gpt2.shape import GPT2Shape
from models.llama.shape import LlamaShape, Qwen2Shape, Qwen3Shape
from models.opt.shape import OPTShape
from models.shape import ModelShape
from parallel.config.parallel import TensorConfig
from parallel.pipeline.microbatch import Microbatch
from parallel.sequence import sequence_of
from parallel.tensor import Mode
from parallel.tensor.layers import Linear
from tests.accounts import UNSPLIT, mesh_of
from tests.test_fp8_matmul import scales
from tests.test_memory import block_of

SIZES: dict[str, Any] = dict(
    vocab_size=37, hidden_size=48, num_hidden_layers=1, num_attention_heads=6, intermediate_size=80
)
OPT: dict[str, Any] = dict(vocab_size=37, hidden_size=48, num_hidden_layers=1, num_attention_heads=6, ffn_dim=80)
SHAPES: Mapping[str, ModelShape] = {
    "opt": OPTShape(**OPT, word_embed_proj_dim=48),
    "llama, grouped": LlamaShape(**SIZES, num_key_value_heads=2),
    "gpt2": GPT2Shape(vocab_size=37, n_embd=48, n_layer=1, n_head=6, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "llama": LlamaShape(**SIZES),
    "qwen2": Qwen2Shape(**SIZES, num_key_value_heads=3),
    "qwen3": Qwen3Shape(**SIZES, num_key_value_heads=3, head_dim=12),
}


def compare_interpreted() -> None:
    """Compare two blocks, whose functions are those of a GPU, and whose kernels are interpreted."""
    for family in ("opt", "llama, grouped"):
        compare(SHAPES[family], "cpu", length=3)
        compare(SHAPES[family], "cpu", length=3, in_8_bits=True)


def compare_compiled_and_interpreted() -> None:
    """Compare a block in whose compiled code the kernels are operators, which are interpreted."""
    compare(SHAPES["llama, grouped"], "cpu", length=5, backend="aot_eager")


def compare(
    shape: ModelShape, device: str, *, length: int, backend: str | None = None, in_8_bits: bool = False
) -> None:
    """Compare the output and every gradient in bf16 with those in fp64: twice the error of torch's functions at most.

    Norms of errors are compared. torch's counts as at least the rounding of the dtype. `backend` compiles the block;
    `in_8_bits`: the linears of both multiply in 8 bits.
    """
    exact = results(shape, torch.float64, device, length)
    with _launching(False):
        reference = results(shape, torch.bfloat16, device, length, None, in_8_bits)
    with _launching(True, in_compiled_code=backend is not None):
        found = results(shape, torch.bfloat16, device, length, backend, in_8_bits)
    assert found.keys() == exact.keys() == reference.keys()
    for name, wanted in exact.items():
        error, of_torch = ((x[name].double() - wanted).norm() for x in (found, reference))
        rounding = wanted.norm() * torch.finfo(torch.bfloat16).eps / 2
        assert error <= 2 * torch.maximum(of_torch, rounding), (shape.model_type, name, error.item(), of_torch.item())


@contextmanager
def _launching(answer: bool, *, in_compiled_code: bool = False) -> Iterator[None]:
    """Answer whether kernels are launched: by what follows a linear in code that is not compiled, or in compiled."""

    def answers(*arguments: object, **options: object) -> bool:
        return answer

    with (
        patch.object(Linear, "is_followed_by", lambda *arguments: answer and not in_compiled_code),
        patch("models.attention.is_fused", answers),
        patch("parallel.ops.kernels.activation.is_fused", answers),
    ):
        yield


def results(
    shape: ModelShape,
    dtype: torch.dtype,
    device: str,
    length: int,
    backend: str | None = None,
    in_8_bits: bool = False,
) -> dict[str, Tensor]:
    """Return the output of a block and all of its gradients, for the same numbers in each dtype."""
    mesh = mesh_of(0, TensorConfig(), UNSPLIT)
    mesh.device = torch.device(device)
    block = block_of(shape, Mode(mesh, dtype, sequence=sequence_of(mesh, UNSPLIT), overlaps=False))
    for linear in block.modules():
        if isinstance(linear, Linear) and in_8_bits:
            linear.multiply_in_8_bits(scales())
    if backend is not None:
        block.compile(backend=backend, fullgraph=True)
    generator = torch.Generator().manual_seed(0)

    def numbers(sizes: torch.Size, scale: float = 1.0) -> Tensor:
        x = torch.randn(sizes, generator=generator, dtype=torch.float64) * scale
        return x.to(torch.bfloat16).to(device, dtype)

    for parameter in block.parameters():
        parameter.data = numbers(parameter.shape, 0.1)
    x = numbers(torch.Size((2, length, shape.hidden_size))).requires_grad_()
    tokens = torch.zeros(2, length, dtype=torch.int64, device=device)
    y = block(x, Microbatch(tokens, tokens, torch.arange(2, device=device)))
    y.backward(numbers(y.shape))
    gradients = {"x": x.grad} | {name: parameter.grad for name, parameter in block.named_parameters()}
    return {"y": y.detach()} | {name: gradient for name, gradient in gradients.items() if gradient is not None}

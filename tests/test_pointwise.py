"""Blocks of every family with the kernels of activations and heads are as exact as with torch's functions."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import models.attention
import models.layer
import parallel.ops.kernels.activation
import parallel.ops.kernels.column_sum
from models.gpt2.shape import GPT2Shape
from models.llama.shape import LlamaShape, Qwen2Shape, Qwen3Shape
from models.opt.shape import OPTShape
from models.shape import ModelShape
from parallel.config.parallel import TensorConfig
from parallel.pipeline.microbatch import Microbatch
from parallel.sequence import sequence_of
from parallel.tensor import Mode
from tests.accounts import UNSPLIT, mesh_of
from tests.test_memory import block_of

B, S = 3, 70
SIZES: dict[str, Any] = dict(
    vocab_size=37, hidden_size=96, num_hidden_layers=1, num_attention_heads=6, intermediate_size=200
)
SHAPES: Mapping[str, ModelShape] = {
    "opt": OPTShape(
        vocab_size=37, hidden_size=96, num_hidden_layers=1, num_attention_heads=6, ffn_dim=200, word_embed_proj_dim=96
    ),
    "gpt2": GPT2Shape(vocab_size=37, n_embd=96, n_layer=1, n_head=6, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "llama": LlamaShape(**SIZES),
    "llama, grouped": LlamaShape(**SIZES, num_key_value_heads=2),
    "qwen2": Qwen2Shape(**SIZES, num_key_value_heads=3),
    "qwen3": Qwen3Shape(**SIZES, num_key_value_heads=3, head_dim=24),
}


def results(shape: ModelShape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the output of a block and all of its gradients, on a GPU, for the same numbers in each dtype."""
    mesh = mesh_of(0, TensorConfig(), UNSPLIT)
    mesh.device = torch.device("cuda")
    mode = Mode(mesh, dtype, sequence=sequence_of(mesh, UNSPLIT), overlaps=False)
    block = block_of(shape, mode)
    generator = torch.Generator().manual_seed(0)

    def numbers(sizes: torch.Size, scale: float = 1.0) -> Tensor:
        return (
            (torch.randn(sizes, generator=generator, dtype=torch.float64) * scale).to(torch.bfloat16).to("cuda", dtype)
        )

    for parameter in block.parameters():
        parameter.data = numbers(parameter.shape, 0.1)
    x = numbers(torch.Size((B, S, shape.hidden_size))).requires_grad_()
    tokens = torch.zeros(B, S, dtype=torch.int64, device="cuda")
    y = block(x, Microbatch(tokens, tokens, torch.arange(B, device="cuda")))
    y.backward(numbers(y.shape))
    found = {"y": y.detach(), "dx": x.grad}
    found |= {name: parameter.grad for name, parameter in block.named_parameters()}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("family", SHAPES)
def test_a_block_with_kernels_is_as_exact_as_without(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error's norm is at most twice that of torch's functions, beside fp64, for the output and every gradient.

    It counts as at least the rounding of the dtype: a gradient that is nearly zero is a sum of rounding errors.
    """
    shape = SHAPES[family]
    with_kernels, exact = results(shape, torch.bfloat16), results(shape, torch.float64)
    for module in (
        models.attention,
        models.layer,
        parallel.ops.kernels.activation,
        parallel.ops.kernels.column_sum,
    ):
        monkeypatch.setattr(module, "is_fused", lambda *arguments, **options: False)
    without = results(shape, torch.bfloat16)
    assert with_kernels.keys() == exact.keys() == without.keys()
    for name, wanted in exact.items():
        error, of_torch = ((found[name].double() - wanted).norm() for found in (with_kernels, without))
        rounding = wanted.norm() * torch.finfo(torch.bfloat16).eps / 2
        assert error <= 2 * torch.maximum(of_torch, rounding), (name, error.item(), of_torch.item())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_are_as_exact_as_torch_on_a_gpu(dtype: torch.dtype) -> None:
    from tests.interpreted.pointwise import main  # imports Triton

    main("cuda", (dtype,))

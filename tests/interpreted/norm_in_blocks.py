"""Blocks whose norms, residual adds and dropouts are kernels, beside the same blocks composed of torch's functions."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from models.layer import Block
from models.llama.layers import block_of as llama_block
from models.llama.layers import rotary_of
from models.llama.shape import LlamaShape
from models.opt.layers import block_of as opt_block
from models.opt.shape import OPTShape
from parallel.activations.recompute import Recomputed
from parallel.mesh.mesh import Mesh
from parallel.mesh.topology import Topology
from parallel.pipeline.microbatch import Microbatch
from parallel.tensor import Mode
from parallel.tensor.layers import Linear
from parallel.tensor.matmul import LinearCollectives
from parallel.tensor.scaling import Scaling

SAMPLES, LENGTH, HIDDEN = 2, 5, 24
FAMILIES = "opt", "opt, norms after", "llama"
BOUND = 1e-5  # relative, in fp32: some tens of roundings


@contextmanager
def kernels_are(used: bool) -> Iterator[None]:
    """Have the kernels used for every tensor, or for none."""
    with patch("parallel.ops.kernels.norm.is_fused", lambda name, x, row: used):
        yield


def block_of(family: str, device: str, dtype: torch.dtype) -> Block:
    """Return a block with random parameters, and with dropout in OPT."""
    mesh = Mesh(Topology(dict(pipe=1, data=1, context=1)), 0, device=torch.device(device))
    mode = Mode(mesh, dtype)
    sizes: dict[str, Any] = dict(hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    if family == "llama":
        shape = LlamaShape(**sizes, intermediate_size=40, num_key_value_heads=2)
        block = llama_block(shape, mode, rotary_of(shape, mode), None, seed=3)
    else:
        sizes |= dict(ffn_dim=40, max_position_embeddings=LENGTH, dropout=0.3)
        block = opt_block(OPTShape(**sizes, do_layer_norm_before="after" not in family), mode, 3)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 3 + 0.2)
    return block


def results(block: nn.Module, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the output of a block and all gradients."""
    generator = torch.Generator().manual_seed(1)
    x, dy = (torch.randn(SAMPLES, LENGTH, HIDDEN, generator=generator).to(device, dtype) for _ in range(2))
    tokens = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64, device=device)
    batch = Microbatch(tokens, tokens, torch.tensor([5, 2**33], device=device))
    x.requires_grad_()
    block.zero_grad()
    y = block(x, batch)
    y.backward(dy)
    assert x.grad is not None
    found = {"y": y.detach(), "dx": x.grad}
    return found | {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}


def compare(family: str, device: str) -> None:
    """Compare a block with kernels with one without, and recomputation with none: bit for bit, and in products."""
    block = block_of(family, device, torch.float32)
    with kernels_are(False):
        wanted = results(block, device, torch.float32)
    with kernels_are(True):
        found = results(block, device, torch.float32)
        products = counted_products(block, device)
        again = {
            name.removeprefix("layer."): x for name, x in results(Recomputed(block), device, torch.float32).items()
        }
        of_recomputed = counted_products(Recomputed(block), device)
    assert found.keys() == wanted.keys() == again.keys()
    for name, want in wanted.items():
        error = (found[name] - want).norm() / want.norm()
        assert error <= BOUND, (family, name, float(error))
        assert torch.equal(found[name], again[name]), (family, name)
    linears = 4
    assert products == linears, products
    computes_last = "after" in family  # the last norm needs it
    assert of_recomputed == 2 * linears - (not computes_last), of_recomputed


def compare_8_bits(family: str, device: str) -> None:
    """Compare a block whose norms write 8 bits with one whose linears cast: bit for bit, also when recomputed."""
    block = block_of(family, device, torch.bfloat16)
    linears = [module for module in block.modules() if isinstance(module, Linear)]
    scaling = Scaling([(str(i),) for i in range(len(linears))], [], torch.device(device))
    scaling.scales.fill_(16.0)
    scaling.inverses.fill_(1 / 16.0)
    scaling.state.is_known = True
    for linear, scales in zip(linears, scaling.linears, strict=True):
        linear.multiply_in_8_bits(scales)
    found, largest = [], []
    for layer, casts in ((block, True), (block, False), (Recomputed(block), True)):
        with kernels_are(True), patch.object(Linear, "input_form", Linear.input_form if casts else None):
            with scaling.casting(records=True):
                found.append(results(layer, device, torch.bfloat16))
            largest.append(scaling.amax[:, ::2].clone())  # of inputs and gradients: weights are cast once
    for name, x in found[0].items():
        assert torch.equal(x, found[1][name]), (family, name)
        assert torch.equal(x, found[2][name if name in ("y", "dx") else f"layer.{name}"]), (family, name)
    assert all(torch.equal(largest[0], other) for other in largest[1:]), (family, largest)
    assert bool((largest[0] > 0).all()), largest


def counted_products(block: nn.Module, device: str) -> int:
    """Return how many linears a forward and a backward compute."""
    calls = []
    original = LinearCollectives.linear

    def linear(self: LinearCollectives, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(w.shape)
        return original(self, x, w, bias)

    with patch.object(LinearCollectives, "linear", linear):
        results(block, device, torch.float32)
    return len(calls)


def main(device: str = "cpu") -> None:
    """Compare the blocks of all families."""
    for family in FAMILIES:
        compare(family, device)
    compare_8_bits("llama", device)


def interpret() -> None:
    """Compare on a CPU."""
    main()

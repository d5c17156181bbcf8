"""An OPT whose linears, embedding and loss are Megatron-LM's (Shoeybi et al. 2019, arXiv 1909.08053), by megatron-core.

Everything else of the model is plain torch. The layers run on a CPU too, without their CUDA kernels.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from benchmarks.peers import adamw, load, update
from benchmarks.workload import CLIP, Step

IS_INSTALLED = find_spec("megatron") is not None
WHOLE = ("norm.weight", "norm.bias", "positions.weight", "out.bias", "fc2.bias")  # not split: whole on every rank


def megatron(folder: Path, rank: int, world_size: int) -> Step:
    """Train with Megatron-LM's tensor parallelism over all ranks."""
    import_module("megatron.core.parallel_state").initialize_model_parallel(tensor_model_parallel_size=world_size)
    model = _Model(load(folder), _Layers(rank, world_size))
    whole = [p for name, p in model.named_parameters() if name.endswith(WHOLE)]
    split = [p for name, p in model.named_parameters() if not name.endswith(WHOLE)]
    optimizer = adamw(model.parameters())

    def step(ids: Tensor) -> float:
        loss: Tensor = model(ids)
        loss.backward()
        of_split, of_whole = (get_total_norm([p.grad for p in part if p.grad is not None]) for part in (split, whole))
        square = of_split.square()
        dist.all_reduce(square)
        clip_grads_with_norm_(model.parameters(), CLIP, (square + of_whole.square()).sqrt())
        update(optimizer)
        return loss.item()

    return step


class _Layers:
    """Makes Megatron's layers, with this rank's part of Hugging Face's weights."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.tp = import_module("megatron.core.tensor_parallel")
        self.common = dict(
            config=import_module("megatron.core").ModelParallelConfig(
                tensor_model_parallel_size=world_size, use_cpu_initialization=True, perform_initialization=False
            ),
            init_method=nn.init.zeros_,  # never called
        )

    def columns(self, *linears: nn.Linear) -> Any:
        """Return one ColumnParallelLinear for several linears of the same input."""
        outputs = sum(linear.out_features for linear in linears)
        made = self.tp.ColumnParallelLinear(linears[0].in_features, outputs, gather_output=False, **self.common)
        made.weight.data.copy_(torch.cat([self.part(linear.weight) for linear in linears]))
        made.bias.data.copy_(torch.cat([self.part(linear.bias) for linear in linears]))
        return made  # forward: (y, None)

    def rows(self, linear: nn.Linear) -> Any:
        """Return a RowParallelLinear."""
        sizes = linear.in_features, linear.out_features
        made = self.tp.RowParallelLinear(*sizes, bias=True, input_is_parallel=True, skip_bias_add=False, **self.common)
        made.weight.data.copy_(self.part(linear.weight, 1))
        made.bias.data.copy_(linear.bias.data)
        return made

    def vocabulary(self, embedding: nn.Embedding) -> Any:
        """Return a VocabParallelEmbedding."""
        made = self.tp.VocabParallelEmbedding(*embedding.weight.shape, **self.common)
        made.weight.data.copy_(self.part(embedding.weight))
        return made

    def part(self, whole: Tensor, dim: int = 0) -> Tensor:
        """Return this rank's slice of a tensor along a dim."""
        return whole.detach().chunk(self.world_size, dim)[self.rank]


class _Block(nn.Module):
    """A block, x[B, S, H] -> y[B, S, H], both whole on every rank; heads and the feed-forward layer are split."""

    def __init__(self, layer: Any, layers: _Layers) -> None:
        super().__init__()
        attention = layer.self_attn
        self.heads = attention.num_heads // layers.world_size
        self.attention_norm, self.ffn_norm = layer.self_attn_layer_norm, layer.final_layer_norm
        self.qkv = layers.columns(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = layers.rows(attention.out_proj)
        self.fc1, self.fc2 = layers.columns(layer.fc1), layers.rows(layer.fc2)

    def forward(self, x: Tensor) -> Tensor:
        fused: Tensor = self.qkv(self.attention_norm(x))[0]
        q, k, v = fused.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))[0]
        out: Tensor = x + self.fc2(self.fc1(self.ffn_norm(x))[0].relu())[0]
        return out


class _Model(nn.Module):
    """The model, ids[B, S] -> the mean loss; embedding, logits and cross entropy are split over the vocabulary."""

    def __init__(self, model: Any, layers: _Layers) -> None:
        super().__init__()
        decoder = model.model.decoder
        self.tokens = layers.vocabulary(decoder.embed_tokens)
        self.positions = nn.Embedding.from_pretrained(decoder.embed_positions.weight.detach(), freeze=False)
        self.layers = nn.ModuleList(_Block(layer, layers) for layer in decoder.layers)
        self.norm = decoder.final_layer_norm
        self.cross_entropy = layers.tp.vocab_parallel_cross_entropy
        self.linear = layers.tp.layers.linear_with_grad_accumulation_and_async_allreduce

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(2, ids.shape[1] + 2))  # OPT's positions start at 2
        for layer in self.layers:
            x = layer(x)
        logits = self.linear(
            self.norm(x),
            self.tokens.weight,
            bias=None,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=True,
            sequence_parallel=False,
        )
        mean: Tensor = self.cross_entropy(logits[:, :-1].contiguous(), ids[:, 1:].contiguous()).mean()
        return mean

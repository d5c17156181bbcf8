"""Self-attention, written once for every tensor mode and every family: see `AttentionOptions`."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from models.layer import Half, dropout_key
from models.rotary import Rotary
from models.shape import ModelShape
from parallel.layout.layout import global_range
from parallel.ops.compiling import materialized, not_compiled
from parallel.ops.kernels.cast import EightBits
from parallel.ops.kernels.heads import by_head, compiled_heads_of, heads_of, parts_of, turned
from parallel.ops.kernels.table import is_fused
from parallel.pipeline.microbatch import Microbatch
from parallel.sequence import AttentionDropout, Masking
from parallel.tensor import Mode
from parallel.tensor.fp8_matmul import CastInput
from parallel.tensor.residual import Addend, output_of


@dataclass(frozen=True)
class AttentionOptions:
    """The options in which the attentions of families differ.

    `bias`, `out_bias`: whether q, k, v and the output's linear have biases. `dropout`: of the probabilities. `rotary`:
    turns q and k by their positions. `head_norm`: the kind and eps of norms of q and k over each head. `window`: how
    many keys, its own among them, a query sees; None: all before it.
    """

    bias: bool
    out_bias: bool
    dropout: float = 0.0
    rotary: Rotary | None = None
    head_norm: tuple[str, float] | None = None
    window: int | None = None


class Attention(Half):
    """Causal self-attention: x[B_batch, S, H_hidden] -> the same shape.

    Heads are split over the axes `mode.inner_hidden`, so attention needs communication only where sequences are split
    (context parallelism). q, k and v are one parameter and one matmul: [3, A · D, H], or [G, (A/G + 2) · D, H] where
    there are fewer k, v heads (G) than q heads (A; grouped-query attention: Ainslie et al. 2023, arXiv 2305.13245).
    """

    def __init__(self, shape: ModelShape, mode: Mode, options: AttentionOptions, seed: int) -> None:
        super().__init__()
        self.mode, self.options, self.dropout_key = mode, options, dropout_key(mode, seed)
        self.all_heads, parts = shape.num_attention_heads, prod(axis.size for axis in mode.inner_hidden)
        self.heads, self.kv_heads = self.all_heads // parts, shape.num_kv_heads // parts  # of this rank
        self.head_size = shape.head_size
        hidden, width, group = shape.hidden_size, self.all_heads * self.head_size, self.heads // self.kv_heads
        if group == 1:
            self.qkv = mode.linear_in(width, hidden, bias=options.bias, fused=3)
        else:
            rows = (group + 2) * self.head_size
            self.qkv = mode.linear_in_groups(shape.num_kv_heads, rows, hidden, bias=options.bias)
        self.q_norm, self.k_norm = (self._head_norm() for _ in range(2))
        self.out = mode.linear_out(hidden, width, bias=options.out_bias)

    def _head_norm(self) -> nn.Module | None:
        if self.options.head_norm is None:
            return None
        kind, eps = self.options.head_norm
        return self.mode.head_norm(kind, self.head_size, eps=eps)

    @property
    def input_form(self) -> EightBits | None:
        return self.qkv.input_form

    def addend(self, x: Tensor | CastInput, batch: Microbatch) -> Addend:
        """Return the output before its bias is added, and the bias, where a kernel adds it to x."""
        heads = self._heads_with_kernels if self.qkv.is_followed_by("heads", x) else self._heads
        q, k, v = heads(x, batch)
        return output_of(self.out, self._attend(q, k, v, batch))

    def _heads(self, x: Tensor | CastInput, batch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return q[B, heads, S, D] and k, v[B, kv heads, S, D], turned by their positions."""
        qkv = self.qkv(x)
        if batch.cache is not None:
            qkv = materialized(qkv)  # attention of a new token reads q, k and v as views
        rotary, trains = self.options.rotary, torch.is_grad_enabled()
        in_one_pass = torch.compiler.is_compiling() and is_fused("heads", qkv)
        if in_one_pass and rotary is not None and self.q_norm is None and trains:
            tables = rotary.tables_for(batch, self.mode, qkv, qkv.shape[1])
            return compiled_heads_of(qkv, self.heads, self.kv_heads, tables)
        q, k, v = parts_of(qkv, self.heads, self.kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        elif rotary is not None and trains:
            v = v.clone()  # only v is kept for backward then, and as a view it would keep the memory of all three
        q, k, v = by_head(q), by_head(k), by_head(v)
        if rotary is not None:
            q, k = rotary(q, k, batch, self.mode)
        return q, k, v

    @not_compiled
    def _heads_with_kernels(self, x: Tensor | CastInput, batch: Microbatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same. Backward joins the three gradients, turned back, and sums the bias's in one pass."""
        rotary, q_norm, k_norm = self.options.rotary, self.q_norm, self.k_norm
        qkv = self.qkv.with_constant_bias(x) if q_norm is None else self.qkv(x)
        tables = None if rotary is None else rotary.tables_for(batch, self.mode, qkv, qkv.shape[1])
        if q_norm is None or k_norm is None:
            return heads_of(qkv, self.heads, self.kv_heads, bias=self.qkv.flat_bias, tables=tables)
        q, k, v = parts_of(qkv, self.heads, self.kv_heads)
        q, k = q_norm(q), k_norm(k)
        if tables is None:
            return by_head(q), by_head(k), by_head(v)
        return turned(q, tables), turned(k, tables), by_head(v)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Microbatch) -> Tensor:
        if batch.cache is not None:
            if batch.cache.new is not None:
                return batch.cache.attend(q, k, v, self.options.window)
            batch.cache.write(k, v)
        return self.mode.sequence.attend(q, k, v, self._masking(batch))

    def _masking(self, batch: Microbatch) -> Masking:
        tokens = dropout = documents = None
        if batch.attention_mask is not None:
            tokens = self.mode.local(batch.attention_mask, self.mode.inner_batch).bool()
        if self.training and self.options.dropout > 0:
            samples = self.mode.local(batch.samples, self.mode.inner_batch)
            heads = global_range(self.mode.inner_hidden, self.heads, samples.device)
            numbers = samples.unsqueeze(1) * self.all_heads + heads
            dropout = AttentionDropout(self.options.dropout, self.dropout_key, numbers)
        if batch.documents is not None:
            documents = batch.documents.apply(lambda x: self.mode.local(x, self.mode.inner_batch))
        return Masking(tokens, dropout, self.options.window, documents)

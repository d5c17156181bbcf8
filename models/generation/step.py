"""The forwards of a batch of texts: whole prompts once, then steps of one token of each text, on tensors that stay."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from models.attention import Attention
from models.generation.sampling import Sampler
from models.generation.trained_model import compiled
from models.layer import Head
from parallel.engine.inference import Inference
from parallel.ops.captured import Captured, graphs_of
from parallel.ops.compiling import not_yet_compiled
from parallel.ops.kernels.cached_attention import is_fused
from parallel.pipeline.microbatch import Microbatch
from parallel.sequence.cache import KeyValueCache, NewTokens, masks_at
from parallel.storage.transfer import to_device

CACHE_UNIT = 64  # positions: rows of masks then begin at addresses that every kernel accepts


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt, and its number among all prompts, which the draws depend on."""

    number: int
    ids: Sequence[int]


@dataclass(frozen=True)
class StepSize:
    """The sizes of the tensors of a step: texts, positions of the caches, and new tokens of a text."""

    texts: int
    positions: int
    new: int

    def holds(self, other: "StepSize") -> bool:
        """Return whether tensors of this size can be used for another one, and are not far too large for it."""
        fits = other.positions <= self.positions <= 2 * other.positions and other.new <= self.new
        return self.texts == other.texts and fits


class _State:
    """The tensors that a step reads and writes, on the device, the same on every rank of a replica.

    tokens, positions [B, 1]   the last token of each text, and its position
    samples [B]                the numbers of the texts
    new [B, T]                 the tokens that were added to each text
    count [1]                  how many
    """

    def __init__(self, size: StepSize, most_positions: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.tokens, self.positions, self.samples = zeros(size.texts, 1), zeros(size.texts, 1), zeros(size.texts)
        self.new, self.count = zeros(size.texts, size.new), zeros(1)
        self.most_positions = most_positions

    def start(self, prompts: Sequence[Prompt]) -> None:
        """Become the state after the last tokens of these prompts."""
        values = [[prompt.ids[-1], len(prompt.ids) - 1, prompt.number] for prompt in prompts]
        tokens, positions, samples = torch.tensor(values).unbind(1)
        self.tokens.copy_(tokens.unsqueeze(1))
        self.positions.copy_(positions.unsqueeze(1))
        self.samples.copy_(samples)
        self.count.zero_()

    def add(self, chosen: Tensor) -> None:
        """Add a token to each text, chosen[B]. The positions of a text that has ended stay within the model's."""
        self.new.index_copy_(1, self.count, chosen.unsqueeze(1))
        self.count.add_(1)
        self.tokens.copy_(chosen.unsqueeze(1))
        self.positions.add_(1).clamp_(max=self.most_positions - 1)


class Step:
    """Adds a token to each text of a batch with each call. On one GPU a call is a CUDA graph.

    `most_positions` is how many the model has. After a batch the same step can `start` another one of its `size`.
    """

    def __init__(self, model: Inference, sampler: Sampler, size: StepSize, most_positions: int) -> None:
        self.model, self.sampler, self.size = model, sampler, size
        self.state = _State(size, min(size.positions, most_positions), model.context.device)
        self.attentions = [part for part in model.part.modules() if isinstance(part, Attention)]
        self.is_fused = all(self._is_fused(attention) for attention in self.attentions)
        self.caches = [KeyValueCache(-(-size.positions // CACHE_UNIT) * CACHE_UNIT) for _ in model.layers]
        self.is_alone = model.mesh.world.size == 1
        compiles = self.is_alone and model.context.config.train.compile and not model.gathers
        self._choose_and_add = compiled(_choose_and_add) if compiles else _choose_and_add
        new_graph = graphs_of(model.context.device) if self.is_alone else None
        self._captured = Captured(self._forward_last_tokens, new_graph, what="new tokens")

    def _is_fused(self, attention: Attention) -> bool:
        texts = self.size.texts // prod(axis.size for axis in attention.mode.inner_batch)
        context, rows = self.model.context, texts * attention.heads
        return is_fused(context.device, context.dtype, attention.head_size, rows=rows)

    @property
    def new(self) -> Tensor:
        """The tokens that were added to each text, int64 [B, T], of which the first ones are set."""
        return self.state.new

    def start(self, prompts: Sequence[Prompt]) -> None:
        """Forward the prompts, padded on the right, and add a token to each: none sees what follows it."""
        self.state.start(prompts)
        ids = torch.zeros(len(prompts), max(len(prompt.ids) for prompt in prompts), dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt.ids)] = torch.tensor(prompt.ids)
        ids = to_device(ids, self.model.context.device)
        for cache in self.caches:
            cache.new = None
        with not_yet_compiled(self.model.context.config.train.compile):
            x = self.model.forward(Microbatch(ids, labels=ids, samples=self.state.samples), self.caches)
            self._add_token(x, self.state.positions.squeeze(1))
        num_blocks = len(self.caches) - (self.model.pipe.rank == 0)  # the embedding attends to nothing
        written = sum(len(cache.kept) > 0 for cache in self.caches)
        assert written == num_blocks, f"{written} of {num_blocks} blocks keep keys and values in `batch.cache`"

    def __call__(self) -> None:
        """Forward the last token of each text, and add the next one."""
        self._captured()

    def _forward_last_tokens(self) -> None:
        state = self.state
        self._show_positions()
        batch = Microbatch(state.tokens, labels=state.tokens, samples=state.samples, position_ids=state.positions)
        self._add_token(self.model.forward(batch, self.caches), torch.zeros_like(state.samples))

    def _show_positions(self) -> None:
        """Tell the caches which tokens are new, which keys they see in each kind of window, and their angles."""
        if not self.attentions:
            return
        first, dtype = self.attentions[0], self.model.context.dtype
        positions = first.mode.local(self.state.positions.squeeze(1), first.mode.inner_batch)
        masks = None
        if not self.is_fused:
            windows = {attention.options.window for attention in self.attentions}
            masks = masks_at(positions, self.caches[0].length, windows, dtype)
        rotary = first.options.rotary  # all attentions share it
        angles = None if rotary is None else rotary.tables_of_new(positions, dtype)
        for cache in self.caches:
            cache.new = NewTokens(positions, masks, angles)

    def _add_token(self, x: Tensor | None, at: Tensor) -> None:
        """Choose the next token of each text by the logits at these places of x, and add it on every stage."""
        model, state = self.model, self.state
        if self.is_alone:
            assert x is not None
            self._choose_and_add(model.head, self.sampler, state, x, at)
            return
        chosen = torch.zeros_like(state.samples) if x is None else _chosen(model.head, self.sampler, state, x, at)
        state.add(model.from_last_stage(chosen))


def _chosen(head: nn.Module, sampler: Sampler, state: _State, x: Tensor, at: Tensor) -> Tensor:
    assert isinstance(head, Head)
    return sampler(head.logits(x, at), state.samples, state.positions.squeeze(1) + 1)


def _choose_and_add(head: nn.Module, sampler: Sampler, state: _State, x: Tensor, at: Tensor) -> None:
    state.add(_chosen(head, sampler, state, x, at))

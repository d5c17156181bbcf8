"""The loop that continues texts: whole prompts once, then one token of each text at a time."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention import Attention
from models.generation.sampling import Sampler, Sampling
from models.layer import Head
from models.rotary import Rotary
from parallel.engine.inference import Inference
from parallel.ops.captured import Captured
from parallel.ops.compiling import not_yet_compiled
from parallel.pipeline.microbatch import Microbatch
from parallel.sequence.cache import KeyValueCache, NewTokens, masks_at
from parallel.storage.transfer import HostCopy, to_device

TOKENS_BETWEEN_LOOKS = 8
"""The host looks at the tokens of the looks before, without waiting for the device: some are generated in vain."""

CACHE_UNIT = 64  # positions: rows of masks then begin at addresses that every kernel accepts


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt, and its number among all prompts, which the draws depend on."""

    number: int
    ids: Sequence[int]


@dataclass(frozen=True)
class Limits:
    """When a text ends: after `num_tokens` new ones, when it has `positions` tokens in all, or with one of `ends`.

    `is_stopped`: told a prompt and its new tokens, returns whether the text ends for another reason.
    """

    num_tokens: int
    positions: int
    ends: Collection[int] = ()
    is_stopped: Callable[[Prompt, Sequence[int]], bool] = lambda prompt, tokens: False


Listener = Callable[[Sequence[Sequence[int]]], None]
"""Told the new tokens of each text so far, every few tokens."""


@torch.no_grad()
def continue_texts(
    model: Inference,
    prompts: Sequence[Prompt],
    limits: Limits,
    sampling: Sampling,
    *,
    listener: Listener = lambda texts: None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, without the token that ended it. Every rank of a replica calls this.

    The prompts are one batch, which is filled up to what the tensor mode divides. Where parameters are gathered on
    demand, all replicas call it together, each with at least one prompt.
    """
    parts = model.context.config.parallel.tensor.batch_parts
    filled = [*prompts, *[prompts[0]] * (-len(prompts) % parts)]
    model.begin()
    try:
        return _Texts(model, filled, limits, Sampler(sampling, model.context.device)).run(listener)[: len(prompts)]
    finally:
        model.end()


@dataclass(frozen=True)
class _State:
    """What a step reads and writes: tensors that stay, on the device, the same on every rank of a replica.

    tokens, positions [B, 1]   the last token of each text, and its position
    samples [B]                the numbers of the texts
    new [B, T]                 the tokens that were added to each text
    count [1]                  how many
    """

    tokens: Tensor
    positions: Tensor
    samples: Tensor
    new: Tensor
    count: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Prompt], num_steps: int, device: torch.device) -> "_State":
        """Return the state after the last tokens of these prompts."""
        values = [[prompt.ids[-1], len(prompt.ids) - 1, prompt.number] for prompt in prompts]
        tokens, positions, samples = torch.tensor(values, device=device).T.contiguous().unsqueeze(2)
        new = torch.zeros(len(prompts), num_steps, dtype=torch.int64, device=device)
        return cls(tokens, positions, samples.squeeze(1), new, torch.zeros(1, dtype=torch.int64, device=device))

    def add(self, chosen: Tensor, most_positions: int) -> None:
        """Add a token to each text, chosen[B]. Those of a text that has ended stay before `most_positions`."""
        self.new.index_copy_(1, self.count, chosen.unsqueeze(1))
        self.count.add_(1)
        self.tokens.copy_(chosen.unsqueeze(1))
        self.positions.add_(1).clamp_(max=most_positions - 1)


class _Texts:
    """The texts of a batch while they are continued."""

    def __init__(self, model: Inference, prompts: Sequence[Prompt], limits: Limits, sampler: Sampler) -> None:
        self.model, self.prompts, self.limits, self.sampler = model, prompts, limits, sampler
        self.allowed = [min(limits.num_tokens, limits.positions - len(prompt.ids)) for prompt in prompts]
        self.num_steps = model.agreed_maximum(max(self.allowed))
        self.state = _State.of(prompts, self.num_steps, model.context.device)
        self.num_positions = max(len(prompt.ids) + count for prompt, count in zip(prompts, self.allowed, strict=True))
        self.attentions = [part for part in model.stage.modules() if isinstance(part, Attention)]
        self.caches = [KeyValueCache(-(-self.num_positions // CACHE_UNIT) * CACHE_UNIT) for _ in model.layers]

    def run(self, listener: Listener) -> list[list[int]]:
        """Continue all texts to their ends, and return their new tokens."""
        self._forward_prompts()
        step = Captured(self._step, captures=self.model.can_be_captured)
        on_device = self.model.context.device.type != "cpu"
        seen = now = HostCopy(self.state.new)
        for done in range(1, self.num_steps):
            step()
            if done % TOKENS_BETWEEN_LOOKS:
                continue
            # A GPU has not come to this token yet: the host looks at the tokens of the last look.
            seen, now = now, HostCopy(self.state.new)
            count = done + 1 - TOKENS_BETWEEN_LOOKS if on_device else done + 1
            texts = self._texts((seen if on_device else now).wait(), count)
            listener([tokens for tokens, _ in texts])
            if not self.model.agreed_maximum(not all(is_done for _, is_done in texts)):
                break
        texts = self._texts(self.state.new.cpu(), int(self.state.count))
        listener([tokens for tokens, _ in texts])
        return [tokens for tokens, _ in texts]

    def _forward_prompts(self) -> None:
        """Forward the prompts, padded on the right: no token sees what follows it."""
        lengths = [len(prompt.ids) for prompt in self.prompts]
        ids = torch.zeros(len(self.prompts), max(lengths), dtype=torch.int64)
        for row, prompt in zip(ids, self.prompts, strict=True):
            row[: len(prompt.ids)] = torch.tensor(prompt.ids)
        ids = to_device(ids, self.model.context.device)
        with not_yet_compiled(self.model.context.config.train.compile):
            x = self.model.forward(Microbatch(ids, labels=ids, samples=self.state.samples), self.caches)
        self._add_token(x, self.state.positions.squeeze(1))

    def _step(self) -> None:
        """Forward the last token of each text, and add the next one."""
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
        windows = {attention.options.window for attention in self.attentions}
        masks = masks_at(positions, self.caches[0].length, windows, dtype)
        rotary = first.options.rotary  # all attentions share it
        angles = rotary.tables_of_new(positions, dtype) if isinstance(rotary, Rotary) else None
        for cache in self.caches:
            cache.new = NewTokens(positions, masks, angles)

    def _add_token(self, x: Tensor | None, at: Tensor) -> None:
        """Choose the next token of each text by the logits at these places of x, and add it on every stage."""
        state = self.state
        chosen = torch.zeros_like(state.samples)
        if x is not None:
            head = self.model.head
            assert isinstance(head, Head)
            chosen = self.sampler(head.logits(x, at), state.samples, state.positions.squeeze(1) + 1)
        state.add(self.model.from_last_stage(chosen), self.num_positions)

    def _texts(self, new: Tensor, count: int) -> list[tuple[list[int], bool]]:
        """Return the first `count` new tokens of each text, up to its end, and whether it has ended."""
        found = []
        for prompt, row, allowed in zip(self.prompts, new.tolist(), self.allowed, strict=True):
            tokens = row[: min(count, allowed)]
            end = next((i for i, token in enumerate(tokens) if token in self.limits.ends), None)
            is_done = end is not None or len(tokens) == allowed or self.limits.is_stopped(prompt, tokens)
            found.append((tokens[:end], is_done))
        return found

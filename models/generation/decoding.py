"""The loop that continues texts until the last of a batch has ended."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.generation.sampling import Sampler, Sampling
from models.generation.step import Prompt, Step, StepSize
from parallel.engine.inference import Inference
from parallel.storage.transfer import HostCopy

TOKENS_BETWEEN_LOOKS = 8
"""The host looks at tokens that were there so many tokens ago, without waiting for the device: some are in vain."""


@dataclass(frozen=True)
class TextLimits:
    """When a text ends: after `num_tokens` new ones, when it has `positions` tokens in all, or with one of `ends`.

    `is_stopped`: told a prompt and its new tokens, returns whether the text ends for another reason.
    """

    num_tokens: int
    positions: int
    ends: Collection[int] = ()
    is_stopped: Callable[[Prompt, Sequence[int]], bool] = lambda prompt, tokens: False


Listener = Callable[[Sequence[Sequence[int]]], None]
"""Told the new tokens of each text so far, every few tokens."""


class Decoder:
    """Continues texts of a model, a batch at a time. Batches of about the same size use the same memory and graph."""

    def __init__(self, model: Inference, limits: TextLimits, sampling: Sampling) -> None:
        self.model, self.limits = model, limits
        self.sampler = Sampler(sampling, model.context.device)
        self._step: Step | None = None

    @torch.no_grad()
    def continue_texts(self, prompts: Sequence[Prompt], *, listener: Listener = lambda texts: None) -> list[list[int]]:
        """Return the new tokens of each prompt, without the token that ended it. Every rank of a replica calls this.

        The batch is filled up to what the tensor mode divides. Where parameters are gathered on demand, all replicas
        call it together, each with at least one prompt.
        """
        parts = self.model.context.config.parallel.tensor.batch_parts
        filled = [*prompts, *[prompts[0]] * (-len(prompts) % parts)]
        self.model.begin()
        try:
            return self._run(filled, listener)[: len(prompts)]
        finally:
            self.model.end()

    def _run(self, prompts: Sequence[Prompt], listener: Listener) -> list[list[int]]:
        num_steps = self.model.agreed_maximum(max(map(self._allowed, prompts)))
        step = self._step_for(prompts, num_steps)
        step.start(prompts)
        on_device = self.model.context.device.type != "cpu"
        now = HostCopy(step.new)
        for done in range(1, num_steps):
            step()
            if done % TOKENS_BETWEEN_LOOKS:
                continue
            # A GPU has not come to this token yet: the host looks at the tokens of the last look.
            seen, now = now, HostCopy(step.new)
            count = done + 1 - TOKENS_BETWEEN_LOOKS if on_device else done + 1
            texts = self._texts(prompts, (seen if on_device else now).wait(), count)
            listener([tokens for tokens, _ in texts])
            if not self.model.agreed_maximum(not all(is_done for _, is_done in texts)):
                num_steps = done + 1
                break
        texts = self._texts(prompts, step.new.cpu(), num_steps)
        listener([tokens for tokens, _ in texts])
        return [tokens for tokens, _ in texts]

    def _step_for(self, prompts: Sequence[Prompt], num_steps: int) -> Step:
        """Return the step of the last batch if this one fits into it, else a new one."""
        positions = max(len(prompt.ids) + self._allowed(prompt) for prompt in prompts)
        size = StepSize(len(prompts), positions, num_steps)
        if self._step is None or not self._step.size.holds(size):
            self._step = None  # its memory is free before that of the next one is taken
            self._step = Step(self.model, self.sampler, size, self.limits.positions)
        return self._step

    def _allowed(self, prompt: Prompt) -> int:
        """Return how many tokens a prompt can be continued by."""
        return min(self.limits.num_tokens, self.limits.positions - len(prompt.ids))

    def _texts(self, prompts: Sequence[Prompt], new: Tensor, count: int) -> list[tuple[list[int], bool]]:
        """Return the first `count` new tokens of each text, up to its end, and whether it has ended."""
        found = []
        for prompt, row in zip(prompts, new.tolist(), strict=True):
            allowed = self._allowed(prompt)
            tokens = row[: min(count, allowed)]
            end = next((i for i, token in enumerate(tokens) if token in self.limits.ends), None)
            is_done = end is not None or len(tokens) == allowed or self.limits.is_stopped(prompt, tokens)
            found.append((tokens[:end], is_done))
        return found

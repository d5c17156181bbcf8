"""Generated texts: prompts are divided over replicas and batches, and their continuations returned in order."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from models.generation.decoding import Decoder, TextLimits
from models.generation.sampling import Sampling
from models.generation.step import Prompt
from models.generation.trained_model import TrainedModel
from models.tokenizer import Tokenizer
from parallel.engine.inference import Inference
from parallel.errors import DataError, names_text
from parallel.mesh.collectives import gather_objects


@dataclass(frozen=True)
class Options:
    """The options of a text. `stops`: texts or special tokens that end one. `batch_size`: prompts of a replica."""

    num_tokens: int = 200
    sampling: Sampling = field(default_factory=Sampling)
    stops: Sequence[str] = ()
    batch_size: int = 32


@dataclass(frozen=True)
class Continuation:
    """The text and the tokens that were added to a prompt, and what ended it.

    `ended`: "end" (a token that ends a text), "stop" (one of the stops), "tokens" (as many as were asked for), or
    "positions" (the model has no more).
    """

    text: str
    tokens: Sequence[int]
    ended: str


class TextGenerator:
    """Continues prompts with a trained model, in any layout."""

    def __init__(self, trained: TrainedModel, options: Options) -> None:
        self.tokenizer, self.options, self.positions = trained.tokenizer, options, trained.shape.max_positions
        specials = {stop: id for stop in options.stops if (id := _special(stop, trained.tokenizer)) is not None}
        self.ends = trained.ends | set(specials.values())
        self.stops = [stop for stop in options.stops if stop not in specials]

    def check(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise DataError for prompts that leave no position for a new token."""
        long = [f"prompt {i} has {len(ids)}" for i, ids in enumerate(prompts, 1) if len(ids) >= self.positions]
        if long:
            raise DataError(
                f"--prompt: {names_text(long)} tokens, and the model has {self.positions} positions. Shorten it to at"
                f" most {self.positions - 1}."
            )

    def generate(
        self, model: Inference, prompts: Sequence[Sequence[int]], listener: Callable[[str], None] | None = None
    ) -> list[Continuation]:
        """Return the continuations of the prompts, in order, on every rank. Every rank calls this.

        `listener` is told the text that has been added to the first prompt so far, every few tokens: what stays.
        """
        data = model.mesh.axis("data")
        all_prompts = [Prompt(number, ids) for number, ids in enumerate(prompts)]
        mine, size = all_prompts[data.rank :: data.size], self.options.batch_size
        limits = TextLimits(self.options.num_tokens, self.positions, self.ends, self._is_stopped)
        decoder = Decoder(model, limits, self.options.sampling)
        found: dict[int, list[int]] = {}
        for start in range(0, -(-len(all_prompts) // data.size), size):
            batch = mine[start : start + size] or all_prompts[:1]  # a replica without prompts of its own repeats one

            def tell(texts: Sequence[Sequence[int]], first: Prompt = batch[0]) -> None:
                if listener is not None and first.number == 0:
                    listener(self._certain(self._continuation(first, texts[0])))

            new = decoder.continue_texts(batch, listener=tell)
            found |= {prompt.number: tokens for prompt, tokens in zip(batch, new, strict=True)}
        of_ranks = gather_objects(found, model.mesh.world)
        tokens = {number: new for part in of_ranks for number, new in part.items()}
        return [self._continuation(prompt, tokens[prompt.number]) for prompt in all_prompts]

    def _continuation(self, prompt: Prompt, tokens: Sequence[int]) -> Continuation:
        """Return the tokens as text, without the stop that ended it and what follows that."""
        text = self._added(prompt, tokens)
        if (begin := self._find_stop(text)) is not None:
            count = bisect_left(range(len(tokens)), True, key=lambda n: self._is_stopped(prompt, tokens[: n + 1]))
            return Continuation(text[:begin], tokens[: count + 1], "stop")
        return Continuation(text, tokens, self._reason(prompt, tokens))

    def _certain(self, growing: Continuation) -> str:
        """Return the text without an end that may not stay: half a character, or the beginning of a stop."""
        text = growing.text.rstrip("\ufffd")
        if growing.ended == "stop":
            return text
        begun = (count for stop in self.stops for count in range(1, len(stop)) if text.endswith(stop[:count]))
        return text[: len(text) - max(begun, default=0)]

    def _reason(self, prompt: Prompt, tokens: Sequence[int]) -> str:
        if len(tokens) == self.options.num_tokens:
            return "tokens"
        return "positions" if len(prompt.ids) + len(tokens) == self.positions else "end"

    def _added(self, prompt: Prompt, tokens: Sequence[int]) -> str:
        """Return the text of new tokens. Some tokenizers leave out a space that begins a text, and none within it."""
        before, whole = (self.tokenizer.decode(ids) for ids in (prompt.ids, [*prompt.ids, *tokens]))
        return whole.removeprefix(before) if whole.startswith(before) else self.tokenizer.decode(tokens)

    def _find_stop(self, text: str) -> int | None:
        """Return where the first stop begins in a text."""
        return min((begin for stop in self.stops if (begin := text.find(stop)) >= 0), default=None)

    def _is_stopped(self, prompt: Prompt, tokens: Sequence[int]) -> bool:
        return bool(self.stops) and self._find_stop(self._added(prompt, tokens)) is not None


def _special(stop: str, tokenizer: Tokenizer) -> int | None:
    """Return the id of a special token, which no decoded text contains; None for any other text."""
    id = tokenizer.vocabulary().get(stop)
    return id if id is not None and tokenizer.decode([id]) == "" else None

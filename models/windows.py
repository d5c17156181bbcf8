"""The token ids of a text that is too long to be encoded at once: exactly those that the whole text has.

The text is cut into windows that overlap, and each is encoded alone. At its ends a window may have other tokens than
the whole text: a word is cut there, a space is put before it, digits are grouped from another place. So two windows are
joined within their overlap, far from the ends, where both have the same tokens on both sides, which are not all space:

    window 1   … | the | cat | sat | on | t̶h̶          joined before "sat":
    window 2         t̶ | c̶a̶t̶ | sat | on | the | …     the | cat + sat | on | the

That is exact in two cases, and no other place is taken. (1) A word of the pre-tokenizer begins there in both windows.
Pre-tokenizers go from left to right, so all words after it are the same as in the whole text, and a word is encoded by
itself. (2) The model is BPE. A sequence of tokens is what BPE makes of a text if each two neighbours are what it makes
of their own text; here these are neighbours in a window, also within a word that no window has as a whole.

Where there is no such place, a longer window is encoded instead, at last the whole text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import tokenizers


@dataclass(frozen=True)
class Sizes:
    """Numbers of characters: of a window, of what two windows share, and of each end of that where none are joined.

    `agreeing` counts the tokens on each side of a joint that must be the same. `at_once` windows are encoded together.
    """

    window: int = 1 << 13
    overlap: int = 1 << 10
    end: int = 1 << 8
    agreeing: int = 8
    at_once: int = 128


@dataclass(frozen=True)
class Window:
    """A part of a text, from character `start` on, and its tokens."""

    start: int
    text: str
    encoding: tokenizers.Encoding
    ids: npt.NDArray[np.int32]

    @property
    def stop(self) -> int:
        return self.start + len(self.text)

    def index(self, character: int) -> int | None:
        """Return the index of the first token that has this character of the text; None where no token has it."""
        index: int | None = self.encoding.char_to_token(character - self.start)
        return index

    def span(self, index: int) -> tuple[int, int]:
        """Return the first character of a token, and the one after its last."""
        span = self.encoding.token_to_chars(index)
        assert span is not None, f"token {index} of {len(self.ids)}"
        return span[0] + self.start, span[1] + self.start

    def is_space(self, first: int, stop: int) -> bool:
        """Return whether the text has nothing but space between two characters."""
        return not self.text[first - self.start : stop - self.start].strip()

    def begins_word(self, index: int) -> bool:
        """Return whether a word of the pre-tokenizer begins with this token."""
        return bool(self.encoding.token_to_word(index) != self.encoding.token_to_word(index - 1))


class WindowEncoder:
    """Encodes long texts by a tokenizer, window by window. The ids have no special tokens around the text."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, sizes: Sizes = Sizes()) -> None:
        assert sizes.window > 2 * sizes.overlap > 4 * sizes.end, sizes
        self._tokenizer, self._sizes = tokenizer, sizes
        model: Any = tokenizer.model
        self._is_bpe = type(model).__name__ == "BPE" and not model.dropout
        self._unknown = tokenizer.token_to_id(model.unk_token) if self._is_bpe and model.unk_token else None

    def encode(self, chunks: Iterable[str]) -> Iterator[npt.NDArray[np.int32]]:
        """Yield the ids of a text, part by part."""
        windows = self._windows(chunks)
        current, first = next(windows, None), 0
        while current is not None:
            following = next(windows, None)
            if following is None:
                yield current.ids[first:]
                return
            joint = self._joint(current, following)
            if joint is None:
                current, first = self._longer(current, first, following, windows)
            else:
                yield current.ids[first : joint[0]]
                current, first = following, joint[1]

    def _windows(self, chunks: Iterable[str]) -> Iterator[Window]:
        """Yield the windows of a text, encoded."""
        cut = _cut(chunks, self._sizes)
        while batch := list(islice(cut, self._sizes.at_once)):
            encodings = self._tokenizer.encode_batch([text for _, text in batch], add_special_tokens=False)
            for (start, text), encoding in zip(batch, encodings, strict=True):
                yield Window(start, text, encoding, np.array(encoding.ids, np.int32))

    def _joint(self, before: Window, after: Window) -> tuple[int, int] | None:
        """Return the indexes, in two windows, of the token from which on the second one counts; None: there is none."""
        low, high = after.start + self._sizes.end, before.stop - self._sizes.end
        found = (before.index(character) for character in range(low, high))
        first = next((index for index in found if index is not None), len(before.ids))
        near = takewhile(lambda index: before.span(index)[0] < high, range(first, len(before.ids)))
        indexes = [index for index in near if before.span(index)[0] >= low]  # the first may begin before
        for of_words in (True, False) if self._is_bpe else (True,):
            for index in indexes:
                if of_words and not (index and before.begins_word(index)):
                    continue
                other = after.index(before.span(index)[0])
                if other is not None and self._agree(before, index, after, other, of_words=of_words):
                    return index, other
        return None

    def _agree(self, before: Window, index: int, after: Window, other: int, *, of_words: bool) -> bool:
        """Return whether both windows have the same tokens around these two, and can be joined before them."""
        near = self._sizes.agreeing
        left, right = slice(index - near, index + near), slice(other - near, other + near)
        if min(left.start, right.start) < 0 or left.stop > len(before.ids) or right.stop > len(after.ids):
            return False
        ids = before.ids[left]
        if not np.array_equal(ids, after.ids[right]) or before.span(index - 1)[1] > before.span(index)[0]:
            return False
        if of_words and not after.begins_word(other):
            return False
        if not of_words and self._unknown in ids[near - 1 : near + 1]:  # several unknown characters may be one token
            return False
        spans = [before.span(index + k) for k in range(-near, near)]
        if spans != [after.span(other + k) for k in range(-near, near)]:
            return False
        # A special token may take in all space beside it, however long: none reaches over what is no space.
        return not before.is_space(spans[0][0], spans[near][0]) and not before.is_space(spans[near][0], spans[-1][1])

    def _longer(self, current: Window, first: int, following: Window, windows: Iterator[Window]) -> tuple[Window, int]:
        """Return a window of at least twice the length, from the current one on, and the token from which it counts."""
        overlap, length = self._sizes.overlap, 2 * len(current.text)
        texts = [current.text, following.text[overlap:]]
        while sum(map(len, texts)) < length and (more := next(windows, None)) is not None:
            texts.append(more.text[overlap:])
        text = "".join(texts)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        longer = Window(current.start, text, encoding, np.array(encoding.ids, np.int32))
        if not first:
            return longer, 0
        index = longer.index(current.span(first)[0])
        assert index is not None, "a token begins where the window before ended"
        assert longer.ids[index] == current.ids[first], "the tokens at a joint do not depend on later text"
        return longer, index


def _cut(chunks: Iterable[str], sizes: Sizes) -> Iterator[tuple[int, str]]:
    """Yield the start and the text of each window. All but the first are longer than the overlap."""
    start, rest = 0, ""
    step = sizes.window - sizes.overlap
    for chunk in chunks:
        rest += chunk
        at = 0
        while len(rest) - at > sizes.window:
            yield start, rest[at : at + sizes.window]
            start, at = start + step, at + step
        rest = rest[at:]
    if rest:
        yield start, rest

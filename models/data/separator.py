"""The token that stands between two texts."""

from __future__ import annotations

from dataclasses import dataclass

from models.tokenizer import Tokenizer
from parallel.errors import DataError


@dataclass(frozen=True)
class Separator:
    """The token that joins two texts: the tokenizer's own, else the model's, which a message says."""

    tokenizer: Tokenizer
    end_of_model: int | None
    vocab_size: int

    @property
    def id(self) -> int | None:
        if self.tokenizer.end is not None:
            return self.tokenizer.end
        return self.end_of_model if self.end_of_model is not None and self.end_of_model < self.vocab_size else None

    def required(self) -> int:
        """Return the token. Raises DataError where there is none."""
        if self.id is None:
            raise DataError(
                "data.tokenizer: it names no token that ends a text, which must stand between two texts of data.path."
                " Name its eos_token in tokenizer_config.json, or set model.eos_token_id."
            )
        return self.id

    def messages(self) -> list[str]:
        if self.tokenizer.end is not None:
            return []
        token = next((repr(token) for token, id in self.tokenizer.vocabulary().items() if id == self.id), "of no text")
        return [
            f"texts are joined by token {self.id}, {token}: model.eos_token_id, since the tokenizer names no eos_token"
        ]

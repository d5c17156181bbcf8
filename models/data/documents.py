"""Documents as token ids, one after another, and the row of them that a corpus is cut from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.tokenizer import Ids


@dataclass(frozen=True)
class Document:
    """The tokens of a text or of a conversation, with those that begin and end it: ids[T].

    `is_learned`: whether the token is a label of the loss, bool [T]. None: all tokens are.
    """

    ids: Ids
    is_learned: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class DocumentRow:
    """Documents joined to one row, tokens[T], which may be mapped from a file.

    Document i is tokens[starts[i]:starts[i+1]]. `starts` is int64 [number of documents + 1]. `is_learned[T]` is there
    where the documents have it. `digest` is a checksum of all of this. `messages` say what was read otherwise than the
    user may expect.
    """

    tokens: Ids
    starts: npt.NDArray[np.int64]
    is_learned: npt.NDArray[np.bool_] | None = None
    digest: int = 0
    messages: tuple[str, ...] = ()

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1

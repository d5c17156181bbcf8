"""Train the tokenizer that `data.tokenizer="bpe"` names, a byte-level BPE, on the text of `python-docs`.

    python -m models.train_bpe

It takes seconds, and writes the folder models/bpe/, which is shipped: Python's manual, and so what is learned from it,
differs between Python versions (the shipped one was trained on 3.11.7's). Its first 260 ids are those of the byte
tokenizer, so any text can be encoded; each of the others is a pair of smaller tokens (Sennrich et al. 2016,
arXiv 1508.07909), found within words as GPT-2 divides a text into them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from models.data.texts import built_in_text
from models.tokenizer import SPECIALS, byte_level_config, byte_level_json
from models.tokenizer_files import BUILT_IN_BPE

VOCAB_SIZE = 4096


def trained_merges(texts: Sequence[str], vocab_size: int) -> list[tuple[str, str]]:
    """Return the pairs of tokens that a BPE of `vocab_size` ids joins, the most frequent pair first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    merges: list[tuple[str, str]] = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return merges


def bpe_json(merges: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return a BPE with these merges in the format of `tokenizers`: the byte tokenizer, and an id for each merge."""
    content: dict[str, Any] = byte_level_json(use_regex=True)
    vocabulary: dict[str, int] = content["model"]["vocab"]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    content["model"]["merges"] = [f"{left} {right}" for left, right in merges]
    return content


def main() -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    merges = trained_merges([built_in_text()], VOCAB_SIZE)
    BUILT_IN_BPE.mkdir(exist_ok=True)
    for name, content in {"tokenizer.json": bpe_json(merges), "tokenizer_config.json": byte_level_config()}.items():
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        (BUILT_IN_BPE / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

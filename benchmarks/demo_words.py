"""The share of words in generated text that Python's manual has: how far the demo has learned English words.

    python -m benchmarks.demo_words runs/opt_tiny_pp2_2p5d/export

A word is two or more letters in a row, in lower case. For each temperature, Hugging Face's `generate` continues a
prompt with several seeds. A high share alone does not make sentences: one word again and again is a share of 100%. So
the number of different words stands beside it.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from models.data.texts import built_in_text

TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 1.0)
SEEDS = 10


def words_of(text: str) -> list[str]:
    """Return the words of a text, in lower case and in their order."""
    return re.findall(r"[a-z]{2,}", text.lower())


def known_share(texts: list[str], corpus: list[str]) -> tuple[float, int]:
    """Return which share of the words in `texts` the words of `corpus` have, and how many different words there are."""
    known, words = set(words_of("\n".join(corpus))), words_of("\n".join(texts))
    return sum(word in known for word in words) / max(1, len(words)), len(set(words))


def generated(folder: Path, prompt: str, tokens: int, temperature: float) -> list[str]:
    """Return what an exported model continues a prompt with, without the prompt: one text for each seed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].repeat(SEEDS, 1)
    torch.manual_seed(0)
    rows = model.generate(
        ids,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=tokens,
        attention_mask=torch.ones_like(ids),
    )
    texts: list[str] = tokenizer.batch_decode(rows[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def main() -> None:
    """Print a row for each temperature."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_words", description=__doc__)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the export of a run: runs/NAME/export")
    parser.add_argument("--prompt", default="The", help="the beginning of each text (default: %(default)r)")
    parser.add_argument("--tokens", type=int, default=120, help="the tokens of each text (default: %(default)s)")
    arguments = parser.parse_args()
    corpus = [built_in_text()]
    print("temperature | known words | different words")
    for temperature in TEMPERATURES:
        texts = generated(arguments.folder, arguments.prompt, arguments.tokens, temperature)
        share, different = known_share(texts, corpus)
        print(f"{temperature} | {share:.1%} | {different}")


if __name__ == "__main__":
    main()

"""Generate text with an exported model, or with any Hugging Face directory that has weights and a tokenizer.

    python -m models.generate runs/NAME/export --prompt "The " --tokens 200

It runs the code that trained the model, in one process. Keys and values are not cached, so each new token costs a
forward of the whole text.
"""

import argparse
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import hf
from models.build import build
from models.generation_config import end_tokens, read_generation_config
from models.layer import Head
from models.shape import ModelShape
from models.shapes import resolve, shape_of
from models.tokenizer import ByteTokenizer, Tokenizer, is_of_bytes, load_tokenizer
from parallel.config import parse
from parallel.engine.context import Place, make_context
from parallel.errors import ColonnadeError, DataError
from parallel.pipeline.microbatch import Microbatch
from parallel.pipeline.stage import Stage


def load_model(folder: Path) -> tuple[Stage, ModelShape]:
    """Return the whole model of a directory, as the single stage of one process, and its shape.

    Raises ConfigError or DataError.
    """
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder}: there is no config.json. Name the export folder of a run.")
    config = parse({"model": {"path": str(folder)}, "data": {"sequence_length": 2}}, resolve=resolve)
    shape = shape_of(config)
    hf.check_weights(folder, shape)
    return build(make_context(config, Place())).eval(), shape


@torch.no_grad()
def next_logits(stage: Stage, tokens: Tensor) -> Tensor:
    """Return the logits of the token that follows: tokens[S] -> logits[V]."""
    ids = tokens.unsqueeze(0)
    batch = Microbatch(ids, labels=ids, samples=torch.zeros(1, dtype=torch.int64), attention_mask=None, scale=1.0)
    *layers, head = stage.layers
    assert isinstance(head, Head)
    x: Any = None
    for layer in layers:
        x = layer(x, batch)
    logits: Tensor = head.mode.logits(head.features(x)[:, -1:], head.table)
    return logits[0, 0]


@dataclass(frozen=True)
class Sampling:
    """The choice of a token, the tokens that end a text, and how many of the last tokens the model is given."""

    temperature: float
    seed: int
    ends: Collection[int]
    positions: int


def generate(stage: Stage, shape: ModelShape, prompt: Tensor, count: int, *, temperature: float, seed: int) -> Tensor:
    """Return prompt[S] and up to `count` new tokens; `eos_token_id` ends the text sooner.

    Temperature 0 takes the most likely token each time. If the text has more tokens than the model has positions, the
    oldest tokens are left out of the input.
    """
    return continued(stage, prompt, count, Sampling(temperature, seed, shape.end_tokens, shape.max_positions))


def continued(stage: Stage, prompt: Tensor, count: int, sampling: Sampling) -> Tensor:
    """Return prompt[S] and up to `count` new tokens, which are chosen as `sampling` says."""
    device = next(stage.parameters()).device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    tokens = prompt.to(device)
    for _ in range(count):
        logits = next_logits(stage, tokens[-sampling.positions :])
        if sampling.temperature == 0:
            token = logits.argmax(keepdim=True)
        else:
            # At most 0 before the division: with a temperature near 0 others become -inf, and no NaN comes of it.
            scaled = (logits - logits.max()) / sampling.temperature
            token = torch.multinomial(scaled.softmax(0), 1, generator=generator)
        if int(token) in sampling.ends:
            break
        tokens = torch.cat([tokens, token])
    return tokens


def complete(folder: Path, prompt: str, count: int, *, temperature: float, seed: int) -> str:
    """Return the prompt and the text that the model in `folder` continues it with.

    A text ends where Hugging Face's `generate` ends it. Without a prompt it begins after the token that ends a text, as
    in training. Raises ConfigError or DataError.
    """
    stage, shape = load_model(folder)
    tokenizer = read_tokenizer(folder)
    end = shape.end_tokens[0] if tokenizer.end is None and shape.end_tokens else tokenizer.end
    if not prompt and end is None:
        raise DataError(
            f"{folder}: neither the tokenizer nor the model says which token begins a text. Give a --prompt."
        )
    ids = torch.from_numpy(tokenizer.encode(prompt)).long() if prompt else torch.tensor([end])
    ends = end_tokens(read_generation_config(folder), shape)
    sampling = Sampling(temperature, seed, ends, shape.max_positions)
    if tokenizer.vocab_size > shape.vocab_size:
        raise DataError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} ids, but the model's vocabulary only"
            f" {shape.vocab_size}. Put the one there that the model was trained with."
        )
    return tokenizer.decode(continued(stage, ids, count, sampling).cpu().numpy())


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a directory.

    The byte tokenizer needs no library to be read again. Raises DataError where there is none.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{folder}: there is no tokenizer.json. Put the one there that the model was trained with.")
    return ByteTokenizer() if is_of_bytes(file) else load_tokenizer(str(folder))


def main(argv: list[str] | None = None) -> int:
    """Print the text that the arguments ask for, and return the exit code."""
    about = "Generate text with an exported model, or with any Hugging Face directory."
    parser = argparse.ArgumentParser(prog="python -m models.generate", description=about)
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="has config.json, safetensors and tokenizer.json: runs/NAME/export")
    add("--prompt", default="The ", help="the beginning of the text (default: %(default)r)")
    add("--tokens", type=int, default=200, help="how many tokens to generate (default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0: the most likely token each time (default: %(default)s)")
    add("--seed", type=int, default=0, help="the seed of the random choices (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if not arguments.temperature >= 0:  # NaN is not, either
        problem = "is negative" if arguments.temperature < 0 else "is no number"
        parser.error(f"--temperature: {arguments.temperature} {problem}. Try 0, the most likely token each time.")
    options = dict(temperature=arguments.temperature, seed=arguments.seed)
    try:
        print(complete(arguments.folder, arguments.prompt, arguments.tokens, **options))
    except ColonnadeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

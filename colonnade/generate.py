"""Continue texts with a trained model: a run's export, any Hugging Face directory of a known family, or a checkpoint.

    colonnade generate runs/NAME/export --prompt "The "                      one process
    colonnade generate runs/NAME --prompts FILE.jsonl --out TEXTS.jsonl      the run's latest checkpoint, many prompts
    colonnade generate DIR --chat --prompt "Hi" --config FILE --nprocs 8     in the layout of a config
    torchrun --nproc-per-node 8 -m colonnade generate DIR --prompt "The " --config FILE     the same, by torchrun

docs/generate.md explains it.
"""

# Torch takes seconds to import, so it is imported in the functions that need it.

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from colonnade.arguments import add_config, count
from colonnade.process import guarded
from colonnade.ranks import run_on_ranks
from colonnade.work import Launch, Prepared

if TYPE_CHECKING:
    from models.data.records import Record
    from models.generation.job import GenerationJob, Request
    from models.generation.text_generator import Continuation
    from parallel.engine.context import Place
    from parallel.watch.watch import Watch
    from training.attempt import Attempt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a generation."""
    add = parser.add_argument
    add("folder", metavar="EXPORT|CHECKPOINT", type=Path, help="a Hugging Face directory, a checkpoint, or a run")
    add("--prompt", action="append", default=[], metavar="TEXT", help="the beginning of a text; may be repeated")
    add("--prompts", type=Path, metavar="FILE", help="a prompt on each line, or a .jsonl with `prompt` or `messages`")
    add("--chat", action="store_true", help="make each prompt the message of a user, by the tokenizer's chat template")
    add("--tokens", type=count, default=200, metavar="N", help="the most new tokens of a text (default: %(default)s)")
    add(
        "--temperature",
        metavar="T",
        type=temperature,
        default=0.8,
        help="0: the most likely token each time (default: %(default)s)",
    )
    add("--top-k", type=count, metavar="K", help="draw from the K most likely tokens (default: from all)")
    add("--top-p", type=probability, default=1.0, metavar="P", help="draw from the most likely tokens whose"
        " probabilities together reach P (default: %(default)s)")  # fmt: skip
    add("--stop", action="append", type=stop, default=[], metavar="TEXT", help="end a text before this text, or at"
        " this special token; may be repeated")  # fmt: skip
    add("--seed", type=int, default=0, help="the seed of the draws (default: %(default)s)")
    add("--dtype", choices=("fp32", "bf16", "fp16", "fp64"), help="of weights and activations (default: the weights')")
    add("--batch-size", type=count, default=32, metavar="N", help="prompts at a time, on each replica of the model"
        " (default: %(default)s)")  # fmt: skip
    add("--tokenizer", metavar="DIR", help="a tokenizer.json, a folder with one, or bytes, in place of the model's own")
    add("--out", type=Path, metavar="FILE", help="write a line of JSON for each prompt, and print no text")
    add_config(parser)
    add("--nprocs", metavar="N", type=count, help="start N processes on this host, without torchrun")


def temperature(text: str) -> float:
    """Return a temperature, 0 or more."""
    value = float(text)
    if not value >= 0:  # NaN is not, either
        problem = "is negative" if value < 0 else "is no number"
        raise argparse.ArgumentTypeError(f"{value} {problem}. Try 0, the most likely token each time")
    return value


def stop(text: str) -> str:
    """Return a text that can end another one: every text contains an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("an empty text is in every text. Try --stop $'\\n', the end of a line")
    return text


def probability(text: str) -> float:
    """Return a number above 0, at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0 and at most 1. Try 0.95")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Print or write the texts that the arguments ask for, and return the exit code. Raises argparse.ArgumentError."""
    if not arguments.prompt and arguments.prompts is None:
        raise argparse.ArgumentError(None, "what shall the texts begin with? Give --prompt TEXT or --prompts FILE")
    if arguments.nprocs is not None and "RANK" in os.environ:
        raise argparse.ArgumentError(None, "--nprocs is not for torchrun, which has started the processes already")
    return main(arguments)


def main(arguments: argparse.Namespace) -> int:
    """Do what the arguments say, in this process or in new ones, and return the exit code."""
    return guarded(lambda: run_on_ranks(main, arguments, partial(_prepare, arguments)))


def _prepare(arguments: argparse.Namespace, launch: Launch) -> Prepared:
    """Check all that can be checked without the weights. Raises ColonnadeError."""
    from models.generation.job import prepare

    place, world_size = launch.place, launch.world_size
    if place.rank == 0 and arguments.out is not None:
        _check_out(arguments.out)
    job = prepare(_request(arguments), place, world_size)

    def work(watch: "Watch", attempt: "Attempt") -> None:
        _generate(arguments, job, place, watch)

    return Prepared(partial(job.facts, world_size), job.config.train.timeout_seconds, work, ["models.generation.job"])


def _generate(arguments: argparse.Namespace, job: "GenerationJob", place: "Place", watch: "Watch") -> None:
    """Generate the texts of the job, and give them out on rank 0. A single one is printed while it grows."""
    from models.generation.job import generate

    streams = place.rank == 0 and arguments.out is None and len(job.prompts) == 1
    if place.rank == 0 and job.trained.folder != arguments.folder:  # a run has several: the export may be a later one
        print(f"reading {job.trained.folder}", file=sys.stderr)
    screen = _Stream(job.prompts[0] if isinstance(job.prompts[0], str) and not arguments.chat else "")
    found = generate(job, place, watch=watch, listener=screen.show if streams else None)
    if streams:
        screen.finish(found[0].text)
    elif place.rank == 0:
        _write(arguments.out, job.prompts, found)
    if place.rank == 0:
        _print_what_was_cut(found, job.trained.shape.max_positions)


def _print_what_was_cut(found: Sequence["Continuation"], positions: int) -> None:
    """Print which texts ended although the model had not ended them, nor the user."""
    cut = [str(number) for number, continuation in enumerate(found, 1) if continuation.ended == "positions"]
    if cut:
        print(f"cut at the model's {positions} positions: text {', '.join(cut)}", file=sys.stderr)


def _request(arguments: argparse.Namespace) -> "Request":
    from models.generation.job import Request
    from models.generation.sampling import Sampling
    from models.generation.text_generator import Options

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    options = Options(arguments.tokens, sampling, tuple(arguments.stop), arguments.batch_size)
    return Request(
        arguments.folder,
        arguments.prompt,
        file=arguments.prompts,
        chat=arguments.chat,
        options=options,
        tokenizer=arguments.tokenizer,
        config=arguments.config,
        assignments=arguments.set,
        dtype=arguments.dtype,
    )


class _Stream:
    """Prints a text while it grows: `prompt` first, then what each call adds."""

    def __init__(self, prompt: str) -> None:
        self.text, self.printed = prompt, 0

    def finish(self, added: str) -> None:
        """Print the rest, and end the line."""
        self.show(added)
        print()

    def show(self, added: str) -> None:
        """Print what is new in the text that has been added to the prompt."""
        whole = self.text + added
        print(whole[self.printed :], end="", flush=True)
        self.printed = max(self.printed, len(whole))


def _check_out(out: Path) -> None:
    """Raise DataError, before texts are generated that could not be written then."""
    from parallel.errors import DataError

    problem = ""
    if os.path.isdir(out):
        problem = f"it is a folder. Try {out / 'texts.jsonl'}"
    elif not os.path.isdir(out.parent):
        problem = f"there is no folder {out.parent}. Make it first"
    elif not os.access(out if os.path.exists(out) else out.parent, os.W_OK):
        problem = "permission denied. Try another folder"
    if problem:
        raise DataError(f"--out: cannot write {out}: {problem}.")


def _write(out: Path | None, prompts: Sequence["str | Record"], found: Sequence["Continuation"]) -> None:
    """Write a line of JSON for each prompt, or print the texts of several. Raises DataError."""
    from parallel.errors import DataError

    if out is None:
        for number, (prompt, continuation) in enumerate(zip(prompts, found, strict=True), 1):
            print(f"--- {number} of {len(found)}")
            print((prompt if isinstance(prompt, str) else "") + continuation.text)
        return
    try:
        with out.open("w", encoding="utf-8") as file:
            for prompt, continuation in zip(prompts, found, strict=True):
                given = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt["messages"]}
                file.write(json.dumps(given | asdict(continuation), ensure_ascii=False) + "\n")
    except OSError as error:
        raise DataError(f"--out: cannot write {out}: {error.strerror}.") from error

"""Train a model in bf16 and in fp8 with several seeds, and compare the validation losses.

    python -W ignore -m benchmarks.fp8_training                 # on a GPU
    python -W ignore -m benchmarks.fp8_training --tiny          # also without a GPU

The text is this machine's Python sources, those of the standard library and of all installed packages, each text once,
in the order of their paths' digests: so the last files, which are for validation, are of all packages. The tokenizer is
the built-in "bpe" of 4,096 ids. The model is an OPT without dropout; a seed draws its weights and the order of samples,
so that runs of the same seed differ in precision alone. In fp8 all linears of blocks multiply in 8 bits, whether they
gain or not. Runs are processes that share the device.

It prints each run's validation loss and the mean training loss of its last tenth; then the mean difference of the two
precisions, and beside it the spread of bf16's seeds, from the lowest to the highest. The exit code says whether the
difference is within the spread.
"""

import argparse
import hashlib
import json
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch

import models
import parallel
from models.data import Cache, Corpus, Loader, SampleOrder, load_tokens
from models.shapes import resolve
from parallel.config import Config, parse

VOCABULARY = 4096


@dataclass(frozen=True)
class Work:
    """The work that all runs have in common: the folder of the text and its tokens, and sizes."""

    folder: Path
    layers: int
    hidden: int
    batch: int
    sequence: int
    steps: int

    def config(self, precision: str, seed: int) -> Config:
        """Return the config of a run."""
        hidden = self.hidden
        sizes = dict(hidden_size=hidden, ffn_dim=4 * hidden, num_attention_heads=max(1, hidden // 64))
        model = dict(name="opt-tiny", vocab_size=VOCABULARY, num_hidden_layers=self.layers, dropout=0.0, **sizes)
        raw = dict(
            model=model | dict(max_position_embeddings=self.sequence),
            data=dict(path=str(self.folder / "sources.jsonl"), tokenizer="bpe", sequence_length=self.sequence),
            train=dict(steps=self.steps, global_batch_size=self.batch, micro_batch_size=self.batch, seed=seed)
            | dict(precision=precision, fp8_min_elements=0),
            lr_scheduler=dict(warmup_steps=self.steps // 20),
        )
        return parse(raw, world_size=1, resolve=resolve)

    def corpus(self) -> Corpus:
        """Return the tokens of the text, which are made once."""
        return load_tokens(self.config("bf16", 0).data, VOCABULARY, cache=Cache(self.folder / "cache"))


@dataclass(frozen=True)
class Outcome:
    """The losses of a run: of all steps, and of the validation after them; and its seconds."""

    precision: str
    seed: int
    training: list[float]
    validation: float
    seconds: float


def sources() -> Iterator[str]:
    """Yield the machine's Python sources, each text once, in the order of the digests of their paths."""
    folders = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    paths = {path for folder in folders for path in folder.rglob("*.py")}
    seen: set[bytes] = set()
    for path in sorted(paths, key=lambda path: hashlib.sha256(str(path).encode()).digest()):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if text and digest not in seen:
            seen.add(digest)
            yield text


def write_text(path: Path, megabytes: float) -> float:
    """Write sources as records until they are of so many megabytes; return how many they are."""
    size = 0
    with path.open("w") as file:
        for text in sources():
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
            if size >= megabytes * 1e6:
                break
    return size / 1e6


def train(work: Work, precision: str, seed: int) -> Outcome:
    """Train once and validate; call this in a process of its own."""
    torch.set_num_threads(1)
    config = work.config(precision, seed)
    context = parallel.launch_from_torch(config, resolve=resolve)
    engine = parallel.Engine(models.build(context), context)
    corpus = work.corpus()
    order = SampleOrder(corpus.num_training, shuffle=True, seed=seed)
    loader = Loader(corpus, order, global_batch=work.batch)
    start = time.perf_counter()
    losses = [engine.train_step(loader.training(step * work.batch)).loss for step in range(work.steps)]
    seconds = time.perf_counter() - start
    return Outcome(precision, seed, losses, engine.evaluate(loader.validation()), seconds)


def all_runs(work: Work, precisions: list[str], seeds: int, jobs: int) -> list[Outcome]:
    """Train with each precision and seed, so many at a time, and print each one when it has ended."""
    found = []
    with ProcessPoolExecutor(jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        futures: list[Future[Outcome]] = [
            pool.submit(train, work, precision, seed) for seed in range(seeds) for precision in precisions
        ]
        for future in as_completed(futures):
            one = future.result()
            last = mean(one.training[-max(1, work.steps // 10) :])
            print(
                f"{one.precision}, seed {one.seed}: validation {one.validation:.4f}, last tenth of training {last:.4f}"
                f" ({one.seconds:.0f} s)",
                flush=True,
            )
            found.append(one)
    return sorted(found, key=lambda one: (one.precision, one.seed))


def is_within_spread(base: list[float], other: list[float]) -> bool:
    """Print validation losses of seeds in two precisions beside each other; return whether the means agree.

    They do if they differ by no more than the base's seeds do among themselves. NaN agrees with nothing.
    """
    difference, spread, others = mean(other) - mean(base), max(base) - min(base), max(other) - min(other)
    pairs = ", ".join(f"{b - a:+.4f}" for a, b in zip(base, other, strict=True))
    is_within = abs(difference) <= spread
    print(f"difference of the means {difference:+.4f} (of each seed: {pairs})")
    print(f"spread of bf16's seeds {spread:.4f}, of the others {others:.4f}")
    print(f"The difference is {'within' if is_within else 'NOT within'} the spread of bf16's seeds.")
    return is_within


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few steps; options given still count")
    parser.add_argument("--precision", default="fp8", help="the one that is compared with bf16")
    usual = dict(megabytes=60, steps=2000, seeds=3, layers=6, hidden=1024, batch=16, sequence=512, jobs=6)
    tiny = dict(megabytes=0.5, steps=4, seeds=2, layers=1, hidden=64, batch=4, sequence=64, jobs=2)
    for name in usual:
        parser.add_argument(f"--{name}", type=float if name == "megabytes" else int, help=f"usually {usual[name]}")
    arguments = parser.parse_args(given)
    chosen = tiny if arguments.tiny else usual
    value = {name: chosen[name] if (x := getattr(arguments, name)) is None else x for name in usual}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        sizes = {name: int(value[name]) for name in ("layers", "hidden", "batch", "sequence", "steps")}
        work = Work(Path(temporary), **sizes)
        megabytes = write_text(work.folder / "sources.jsonl", value["megabytes"])
        corpus = work.corpus()
        print(
            f"{megabytes:.1f} MB of text, {corpus.num_tokens:,} tokens, {corpus.num_validation:,} samples to validate"
        )
        print(f"{json.dumps(sizes)}; {time.monotonic() - begun:.0f} s until here", flush=True)
        runs = all_runs(work, ["bf16", arguments.precision], int(value["seeds"]), int(value["jobs"]))
    bf16, other = ([one.validation for one in runs if one.precision == p] for p in ("bf16", arguments.precision))
    is_within = is_within_spread(bf16, other)
    print(f"{time.monotonic() - begun:.0f} s")
    sys.exit(not is_within)


if __name__ == "__main__":
    main()

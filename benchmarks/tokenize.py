"""Measure how fast text becomes tokens in the cache, beside `datasets.map`, and how much memory that takes.

    python -m benchmarks.tokenize                    # 64 MB and 128 MB of text, in a temporary folder
    python -m benchmarks.tokenize --megabytes 2000   # 2 GB and 4 GB: memory does not grow

The text is Python's manual, its paragraphs in a random order, as records in lines and as one file of text. The
tokenizer is a byte-level BPE of 8,192 tokens, trained on the manual. Each contender runs in a new process. `datasets`
maps the records with the same tokenizer by `map(batched=True)`, which leaves Arrow files; its reading of the lines is
not timed. Ours reads the lines or the text, and leaves the row of tokens. Tokens per second are those of the clock, and
those of a second of CPU time, which other processes of the machine disturb less. The peak is that of the whole process
with its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.data.texts import built_in_text

RECORD_PARAGRAPHS = 20


def write_corpus(folder: Path, megabytes: int) -> None:
    """Write records and a text of this many megabytes each."""
    paragraphs, draw = built_in_text().split("\n\n"), random.Random(0)
    size = 0
    with (folder / "records.jsonl").open("w") as records, (folder / "text.txt").open("w") as text:
        while size < megabytes * 10**6:
            record = "\n\n".join(draw.choices(paragraphs, k=RECORD_PARAGRAPHS))
            records.write(json.dumps({"text": record}) + "\n")
            text.write(record + "\n\n")
            size += len(record)


def write_tokenizer(folder: Path) -> None:
    """Train a tokenizer and save it, as `AutoTokenizer` reads it."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(built_in_text().split("\n\n"), vocab_size=8192, show_progress=False)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    own = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|end|>")
    own.save_pretrained(folder / "tokenizer")


def ours(folder: Path, file: str) -> tuple[int, float, float]:
    """Return the tokens of a file, and the seconds until they are in the cache, also of CPU time."""
    from models.data import Cache, load_tokens
    from parallel.config import DataConfig

    config = DataConfig(path=str(folder / file), tokenizer=str(folder / "tokenizer"))
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        began, cpu = time.perf_counter(), time.process_time()
        corpus = load_tokens(config, 1 << 16, cache=Cache(Path(cache)))
        return corpus.num_tokens, time.perf_counter() - began, time.process_time() - cpu


def theirs(folder: Path, file: str) -> tuple[int, float, float]:
    """Return the tokens of the records, and the seconds that `datasets.map` takes, also of CPU time."""
    import datasets  # type: ignore[import-untyped]
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        records = datasets.load_dataset("json", data_files=str(folder / file), cache_dir=cache, split="train")
        began, cpu = time.perf_counter(), time.process_time()
        found = records.map(
            lambda batch: {"input_ids": tokenizer(batch["text"])["input_ids"]}, batched=True, remove_columns=["text"]
        )
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        column = found.data.column("input_ids")
        return sum(len(chunk.values) for chunk in column.chunks) + len(found) - 1, seconds, cpu  # and what joins them


CONTENDERS: dict[str, tuple[Callable[[Path, str], tuple[int, float, float]], str]] = {
    "ours, records": (ours, "records.jsonl"),
    "ours, one text": (ours, "text.txt"),
    "datasets.map": (theirs, "records.jsonl"),
}


def measure(name: str, folder: Path) -> dict[str, float]:
    """Return tokens, seconds and the peak of memory, in MB, of a contender in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.tokenize", "--contender", name, "--folder", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{name} ended with {process.returncode}: {output}")
    tokens, seconds, cpu = json.loads(output.splitlines()[-1])
    return {"tokens": tokens, "clock": tokens / seconds, "cpu": tokens / cpu, "peak": usage.ru_maxrss / 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        function, file = CONTENDERS[arguments.contender]
        print(json.dumps(function(arguments.folder, file)))
        return
    for megabytes in (arguments.megabytes, 2 * arguments.megabytes):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_corpus(folder, megabytes)
            write_tokenizer(folder)
            for _ in range(arguments.rounds):
                found = {contender: measure(contender, folder) for contender in CONTENDERS}
                base = found["datasets.map"]
                for contender, one in found.items():
                    print(
                        f"{megabytes:6} MB  {contender:15} {one['tokens']:>13,.0f} tokens "
                        f" {one['clock']:>9,.0f} tokens/s, {one['clock'] / base['clock']:5.2f} × datasets.map "
                        f" {one['cpu']:>9,.0f} a CPU second, {one['cpu'] / base['cpu']:5.2f} × "
                        f" peak {one['peak']:5.0f} MB",
                        flush=True,
                    )


if __name__ == "__main__":
    main()

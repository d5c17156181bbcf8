"""Check that the tests notice bugs: each is planted in a copy of the tree, and its test must then fail.

    python -m tests.mutants [--list] [--only NAME ...]

It prints a line for each mutant of the table: red where its test noticed the bug, GREEN where it survived. Red means
that a comparison failed, or that a plan, a config or a model was refused; a crash or a hang does not count.

Importing torch and transformers takes most of the time of a single test. So this process imports them once, and each
run of pytest is a fork of it; where it runs a single test, the ranks of that test are forks too.
"""

import argparse
import atexit
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from unittest.mock import patch

from tests.mutant_table import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent
JOBS = min(8, os.cpu_count() or 1)
OWN = ("tests", "parallel", "models", "training", "colonnade", "launch")
IMPORTED_ONCE = ("pytest", "torch._dynamo", "transformers.models.opt.modeling_opt")

# A failed comparison with a message, or a refusal of a plan, a config or numbers, in a traceback.
NAMED = re.compile(r"(\w+\.)*(AssertionError|PlanError|ConfigError|ModelError|NonFiniteError): .+")


@dataclass(frozen=True)
class Verdict:
    """The result of a mutant. `red`: its test noticed it; `reason`: the test's message, or why it does not count."""

    mutant: Mutant
    red: bool
    reason: str
    seconds: float


class Tree:
    """A copy of the source tree, in which at most one mutant is planted and one pytest runs at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.report, self.output = folder / "tree", folder / "report.xml", folder / "output"
        listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.folder / name)

    def plant(self, mutant: Mutant) -> None:
        """Put the mutant into its file."""
        file = self.folder / mutant.file
        self.healthy = file.read_text()
        assert self.healthy.count(mutant.before) == 1, f"{mutant.file} changed since the start: {mutant.before}"
        file.write_text(self.healthy.replace(mutant.before, mutant.after))

    def heal(self, mutant: Mutant) -> None:
        """Restore the mutant's file."""
        (self.folder / mutant.file).write_text(self.healthy)

    def start(self, tests: Iterable[str]) -> ForkProcess:
        """Start a fork that runs these tests in this tree."""
        self.report.unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(target=_pytest, args=(self, list(tests)))
        process.start()
        return process

    def failures(self, exit_code: int | None) -> list[str]:
        """Return the reports of the tests that failed in a run; where pytest itself failed, the end of its output."""
        if exit_code == 0:
            return []
        found = ET.parse(self.report).iter("failure") if exit_code == 1 and self.report.exists() else ()
        output = self.output.read_text()[-2000:] if self.output.exists() else "it ended before its output began"
        return [failure.text or "" for failure in found] or [f"exit code {exit_code}: {output}"]


def _pytest(tree: Tree, tests: list[str]) -> None:
    """Run pytest in this tree, in a fork that first drops the modules of the tree that it was forked from.

    Of a single test, the ranks are forks too: a test has started no threads before its ranks. A second test cannot
    rely on that.
    """
    import pytest

    atexit._clear()  # otherwise a test that runs these functions in this fork would remove the tree
    with tree.output.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(tree.folder)
    sys.path[:] = [str(tree.folder), *(path for path in sys.path if Path(path).resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] in OWN]:
        del sys.modules[name]
    fork, starts_ranks = multiprocessing.get_context("fork"), "multiprocessing.get_context"
    with patch(starts_ranks, return_value=fork) if len(tests) == 1 else nullcontext():
        code = pytest.main(["-q", "-p", "no:cacheprovider", f"--junit-xml={tree.report}", *tests])
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description="Break the code, and check that the tests notice."
    )
    parser.add_argument("--only", metavar="NAME", nargs="+", help="only these mutants")
    parser.add_argument("--list", action="store_true", help="list the mutants, and run nothing")
    options = parser.parse_args(arguments)
    if unknown := set(options.only or ()) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no mutant is named {', '.join(sorted(unknown))}; --list names them all")
    chosen = [mutant for mutant in MUTANTS if not options.only or mutant.name in options.only]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:44} {mutant.breaks}\n{'':44} {mutant.test}")
        return 0
    stale = [mutant for mutant in chosen if (ROOT / mutant.file).read_text().count(mutant.before) != 1]
    for mutant in stale:
        print(f"{mutant.name}: the table is stale, {mutant.file} does not have exactly once:\n{mutant.before}")
    return 1 if stale else _check(chosen)


def _check(mutants: Sequence[Mutant]) -> int:
    """Check that every named test passes without mutants and fails with its mutant; return 1 if not, else 0."""
    started = time.monotonic()
    # A fork takes these along. A stale .pyc, of the same size and second, would hide a mutant. Torch sees no GPU, as in
    # the tests. Some mutants make ranks wait for each other: that ends after two minutes.
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ.setdefault("COLONNADE_TEST_PATIENCE", "0.2")
    sys.dont_write_bytecode = True
    for name in IMPORTED_ONCE:
        import_module(name)
    with ExitStack() as stack:
        folders = [stack.enter_context(tempfile.TemporaryDirectory(prefix="mutants_")) for _ in range(JOBS)]
        trees = [Tree(Path(folder)) for folder in folders]
        healthy = trees[0].start(dict.fromkeys(mutant.test for mutant in mutants))
        healthy.join()
        if failures := trees[0].failures(healthy.exitcode):
            print("Red without any mutant:", *failures, sep="\n")
            return 1
        print(f"{len(mutants)} mutants. Without them their tests pass. So far: {time.monotonic() - started:.0f} s.")
        survivors = []
        for verdict in _verdicts(mutants, trees):
            print(f"{'red  ' if verdict.red else 'GREEN'} {verdict.seconds:5.1f} s  {verdict.mutant.name}")
            print(f"{'':15}{verdict.mutant.test}\n{'':15}{verdict.reason}", flush=True)
            survivors += [] if verdict.red else [verdict.mutant.name]
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} noticed, in {time.monotonic() - started:.0f} s.")
    if survivors:
        print("Survived:", *survivors, sep="\n  ")
    return 1 if survivors else 0


def _verdicts(mutants: Sequence[Mutant], trees: Sequence[Tree]) -> Iterator[Verdict]:
    """Yield the verdicts as the runs end; at any time one mutant runs in each tree."""
    upcoming, free = list(reversed(mutants)), list(trees)
    running: dict[int, tuple[ForkProcess, Mutant, Tree, float]] = {}  # by the sentinel of the process
    while upcoming or running:
        while upcoming and free:
            mutant, tree = upcoming.pop(), free.pop()
            tree.plant(mutant)
            process = tree.start([mutant.test])
            running[process.sentinel] = process, mutant, tree, time.monotonic()
        for ended in wait(list(running)):
            assert isinstance(ended, int)
            process, mutant, tree, started = running.pop(ended)
            process.join()
            yield _judge(mutant, tree.failures(process.exitcode), time.monotonic() - started)
            tree.heal(mutant)
            free.append(tree)


def _judge(mutant: Mutant, failures: Sequence[str], seconds: float) -> Verdict:
    """Return whether a comparison failed, by the first failure's report."""
    if not failures:
        return Verdict(mutant, False, "the test passes: the mutant survived", seconds)
    lines = [line[1:].strip() for line in failures[0].splitlines() if line.startswith("E ")]
    compared = lines[:1] if lines and lines[0].startswith("assert ") else [line for line in lines if NAMED.match(line)]
    if compared:
        return Verdict(mutant, True, compared[-1], seconds)
    return Verdict(mutant, False, f"but no comparison failed: {failures[0]}", seconds)


if __name__ == "__main__":
    sys.exit(main())

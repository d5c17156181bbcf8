"""Train language models in parallel, from a laptop to many hosts, and use what was trained.

    colonnade COMMAND --help             the options of a command
    colonnade --print-completion bash    a script by which the shell completes commands and options

docs/config.md describes them all.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec

from colonnade.arguments import Parser
from colonnade.completion import SHELLS, completion
from colonnade.process import REFUSED
from colonnade.version import __version__

COMMANDS = {
    "train": "train a model as a config says",
    "check": "show how a config is laid out, without starting it",
    "generate": "continue a text with a trained model",
    "export": "write a checkpoint as a Hugging Face directory",
    "timeline": "draw when each rank does what",
    "plan": "find the layout of a model on given devices",
    "simulate": "predict the time of a step",
    "report": "summarize a run",
    "doctor": "check an installation",
}
"""Every command with its summary. A command is built where there is a module of its name, with two functions:
`add_arguments(parser)`, and `run(arguments)`, which returns the exit code and may raise argparse.ArgumentError."""


def main(arguments: Sequence[str] | None = None, *, program: str = "colonnade") -> int:
    """Run the command that the arguments name, those of this process by default, and return its exit code.

    Arguments that make no sense end the process with code 2.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser, commands = make_parser(program)
    if not arguments:
        parser.print_help(sys.stderr)
        return REFUSED
    if problem := _problem(arguments[0], list(commands)):
        parser.error(problem)
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:  # the command's own usage is printed with it
        commands.get(parsed.command, parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if parsed.print_completion is not None:
        _print_to_reader(completion(make_parser("colonnade")[0], parsed.print_completion))
        return 0
    try:
        return int(import_module(f"colonnade.{parsed.command}").run(parsed))
    except argparse.ArgumentError as error:
        commands[parsed.command].error(str(error))


def make_parser(program: str) -> tuple[Parser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the whole command line, and that of each command that is built."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=program, description=__doc__, formatter_class=plain)
    parser.add_argument("--version", action="version", version=f"colonnade {__version__}")
    parser.add_argument("--print-completion", choices=SHELLS, help="print a script for the completion of this shell")
    added = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands: dict[str, argparse.ArgumentParser] = {}
    for name in filter(_is_built, COMMANDS):
        module = import_module(f"colonnade.{name}")
        commands[name] = added.add_parser(name, help=COMMANDS[name], description=module.__doc__, formatter_class=plain)
        module.add_arguments(commands[name])
    return parser, commands


def _print_to_reader(text: str) -> None:
    """Print a text to a reader that may have gone, as `head` has. No package of ours is imported for it."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again when it ends


def _is_built(name: str) -> bool:
    return find_spec(f"colonnade.{name}") is not None


def _problem(word: str, built: Sequence[str]) -> str:
    """Return why the first word of a command line is no command, and what would work; empty where it is one."""
    if word in built or word.startswith("-"):
        return ""
    if word in COMMANDS:
        return f"{word!r} is not built yet. Available: {', '.join(built)}."
    nearest = get_close_matches(word, built, n=1)
    advice = f"Did you mean {nearest[0]!r}?" if nearest else f"Available: {', '.join(built)}."
    return f"unknown command {word!r}. {advice}"

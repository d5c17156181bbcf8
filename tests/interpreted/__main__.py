"""Runs the programs that are named by the arguments, one after the other: `python -m tests.interpreted sums norm`."""

import sys
from importlib import import_module

if __name__ == "__main__":
    for name in sys.argv[1:]:
        import_module(f"tests.interpreted.{name}").interpret()

"""Measure the CPU seconds of launch.py's commands that start nothing, beside those of `import torch`.

    python -m benchmarks.startup                # five rounds; it writes no files

Each command runs in a new process, one after another in every round. The smallest sum of user and system time is
printed. `--check` takes about as long as `import torch`: the garbage collections that launch.py avoids make up for its
own work. It took 2.1 times as long when every process imported torch's compiler (tests/test_imports.py).
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import parallel": ["-c", "import parallel"],
    "launch.py --check": ["launch.py", "--check"],
    "launch.py --help": ["launch.py", "--help"],
    "launch.py, refused": ["launch.py", "--set", "train.stepz=1"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """Return the CPU seconds of a new Python process with these arguments, from its start to its end."""
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0  # it has been waited for
    return usage.ru_utime + usage.ru_stime


def measure(rounds: int) -> dict[str, float]:
    """Return the smallest CPU seconds of each command in this many rounds."""
    found = [{name: cpu_seconds(arguments) for name, arguments in COMMANDS.items()} for _ in range(rounds)]
    return {name: min(one[name] for one in found) for name in COMMANDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    found = measure(parser.parse_args().rounds)
    for name, seconds in found.items():
        print(f"{name:20} {seconds:6.2f} s  {seconds / found['import torch']:5.2f} × import torch")


if __name__ == "__main__":
    main()

"""The work of a command on its ranks: this process, those that torchrun has started, or new ones on this host."""

import argparse
import os
from collections.abc import Callable

from colonnade.process import REFUSED, import_torch, note_stop_signals
from colonnade.work import Launch, Prepared


def run_on_ranks(
    main: Callable[[argparse.Namespace], int],
    arguments: argparse.Namespace,
    prepare: Callable[[Launch], Prepared],
) -> int:
    """Prepare the work and do it, in this process or in `arguments.nprocs` new ones, each of which calls `main`.

    Returns the exit code; a refusal is printed without a traceback.
    """
    # When one rank refuses, torchrun sends SIGTERM to the others at once. They go on until they have checked the work
    # themselves, so that rank 0 comes to print why it is refused.
    came = note_stop_signals(ends="RANK" not in os.environ)
    if not import_torch():
        return REFUSED
    from colonnade.rank_process import RankProcess

    return RankProcess(came).run(main, arguments, prepare)

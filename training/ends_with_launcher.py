"""The state of the fork server before it forks: it ends with its launcher, and signals are blocked for each rank.

Python's fork server ends by itself only when no rank is left, since each rank keeps the server's lifeline open. A rank
that is stopped would keep the server, and with it itself, where the launcher is killed.

A rank ignored a signal that came before it had handlers, in an earlier version, and trained on while its launcher
waited. A blocked signal waits until the rank unblocks it.

The modules that the server imports are the only code of ours that it executes; nothing else imports this one.
"""

import os
import signal

from parallel.engine.stop_signals import STOP_SIGNALS
from parallel.watch.process import die_with

die_with(os.getppid())
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

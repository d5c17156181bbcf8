"""The end of the fork server where its launcher is killed: the server imports this module, which has the kernel do it.

Python's fork server ends by itself only when no rank is left, since each rank keeps the server's lifeline open. A rank
that is stopped would keep the server, and with it itself. The modules that the server imports are the only code of ours
that it executes; nothing else imports this one.
"""

import os

from parallel.watch.process import die_with

die_with(os.getppid())

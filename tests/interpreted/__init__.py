"""Programs that compare kernels with their references on a CPU: `test_kernels.py` calls `interpret` of each module.

Triton's interpreter is chosen when a kernel is imported, so they need a process with TRITON_INTERPRET=1.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreted._rounding import round_to_nearest

    round_to_nearest()

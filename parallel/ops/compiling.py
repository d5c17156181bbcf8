"""A mark for functions that torch.compile calls as they are: those that communicate, and those with hooks."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C._dynamo import eval_frame

F = TypeVar("F", bound=Callable[..., Any])


def not_compiled(function: F) -> F:
    """Return the function, marked so that torch.compile compiles neither it nor what it calls.

    This does what `torch.compiler.disable` does, without its two costs: that imports torch's compiler, a second of CPU
    time in every process that never compiles anything, and wraps the function, a microsecond a call. Compiled code ends
    a graph where it calls a function with the attribute, as with torch's own `disable` and `skip`
    (torch/_dynamo/decorators.py). The strategy is for the call itself, outside of a graph: torch's frame evaluator
    then hands neither this frame nor those below it to the compiler.
    """
    if not hasattr(eval_frame, "set_code_exec_strategy"):  # it is private to torch: 2.11 to 2.13 have it
        return torch.compiler.disable(function)  # type: ignore[no-any-return]
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function

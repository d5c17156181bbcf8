"""Marks for torch.compile: of functions that it must not look into, of calls that it leaves out, and of tensors."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

F = TypeVar("F", bound=Callable[..., Any])


def not_compiled(function: F) -> F:
    """Return the function, marked so that torch.compile compiles neither it nor what it calls.

    It does what `torch.compiler.disable` does, without two costs. `disable` imports torch's compiler, a second of CPU
    time in every process, and wraps the function, half a microsecond a call. Here two marks are set, which are those of
    torch's own decorators (torch/_dynamo/decorators.py): because of the attribute, compiled code ends a graph where it
    calls the function; because of the strategy, torch's frame evaluator hands neither the frame of that call nor the
    frames below it to the compiler.
    """
    if not hasattr(eval_frame, "set_code_exec_strategy"):  # private to torch; 2.11 and 2.13 have it
        return torch.compiler.disable(function)  # type: ignore[no-any-return]
    skip = eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def constant_in_compiled_code(function: F) -> F:
    """Return the function, marked so that torch.compile calls it once, and takes its result for a constant.

    The mark is that of `torch.compiler.assume_constant_result`, which would import torch's compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def not_yet_compiled(compiles: bool) -> AbstractContextManager[None]:
    """Return a context in which layers that are compiled otherwise run as usual: for a call whose shapes come once.

    `compiles`: whether there are such layers; without them torch's compiler is not imported.
    """
    if not compiles:
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def materialized(x: Tensor) -> Tensor:
    """Return x, which compiled code then computes into memory by the kernel that makes it.

    Otherwise an addition, say, is left to what reads its sum: if views of it are read, each of them gets a copy, and
    the copies need a kernel of their own. Of `as_strided` the compiler knows that it is a view of memory.
    """
    return x.as_strided(x.shape, x.stride()) if torch.compiler.is_compiling() else x

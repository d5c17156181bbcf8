"""`debug_comm`: ranks that call different collectives are named, with what each calls and where, before any waits."""

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import models
import parallel
from parallel.collectives import all_gather, all_reduce, barrier
from parallel.config import parse
from parallel.engine.context import Place, make_context
from parallel.engine.engine import Engine
from parallel.errors import CollectiveError
from parallel.mesh.collectives import MAX
from parallel.mesh.comparison import described
from parallel.pipeline.p2p import Pipe, start_receive, start_send
from tests import parting
from tests.harness import run
from tests.parting import play

X = torch.ones(4, 2)
LINE = r" at test_debug_comm.py:\d+ in <lambda>"

Call = Callable[[Any], object]
CALLS: dict[str, tuple[Call, Call, str]] = {
    "another collective": (
        lambda axis: all_reduce(X, axis),
        lambda axis: all_gather(X, 0, axis),
        rf"rank 0: all_reduce \(SUM\) of float32 \[4, 2\]{LINE}; rank 1: all_gather \(dim 0\) of float32 \[4, 2\]",
    ),
    "another shape": (
        lambda axis: all_reduce(X, axis),
        lambda axis: all_reduce(X[:3], axis),
        rf"rank 0: all_reduce \(SUM\) of float32 \[4, 2\]{LINE}; rank 1: all_reduce \(SUM\) of float32 \[3, 2\]{LINE}",
    ),
    "another dtype": (
        lambda axis: all_reduce(X, axis),
        lambda axis: all_reduce(X.bfloat16(), axis),
        rf"rank 0: all_reduce \(SUM\) of float32 \[4, 2\]{LINE}; rank 1: all_reduce \(SUM\) of bfloat16 \[4, 2\]{LINE}",
    ),
    "another reduction": (
        lambda axis: all_reduce(X, axis),
        lambda axis: all_reduce(X, axis, MAX),
        r"rank 0: all_reduce \(SUM\) of .*; rank 1: all_reduce \(MAX\) of ",
    ),
    "a barrier": (barrier, lambda axis: all_reduce(X, axis), r"rank 0: barrier at .*; rank 1: all_reduce"),
}


def messages(rank: int, world_size: int) -> list[str]:
    """Return the message of the error that this rank's call raises, for each case."""
    context = make_context(parse({"train": {"device": "cpu"}}, world_size=2), Place(rank, 2, rank, 2), debug_comm=True)
    return [message_of(partial(calls[:2][rank], context.mesh.axis("data"))) for calls in CALLS.values()]


def message_of(call: Callable[[], object]) -> str:
    """Return the message of the CollectiveError that a call raises."""
    try:
        call()
    except CollectiveError as error:
        return str(error)
    return "nothing was raised"


def test_ranks_that_call_different_collectives_are_named_on_every_rank() -> None:
    one, other = run(messages, 2)
    assert one == other
    for (_, _, pattern), message in zip(CALLS.values(), one, strict=True):
        assert message.startswith("the ranks of the axis data communicate differently: ")
        assert re.search(pattern, message), message


SENT = (X[:2], X.bfloat16())


def messages_of_receives(rank: int, world_size: int) -> list[str]:
    """Send what the other stage does not receive; return the messages of the errors that it raises."""
    sections = {"train": {"device": "cpu"}, "parallel": {"pipeline": {"size": 2}}}
    context = make_context(parse(sections, world_size=2), Place(rank, 2, rank, 2), debug_comm=True)
    axis, found = Pipe(context.mesh.axis("pipe"), context.mesh.links).link(0, 1), []
    for sent in SENT:
        if rank == 0:
            start_send(sent, axis, 1).wait()
            continue
        found.append(message_of(lambda: start_receive((4, 2), X, axis, 0)))
        dist.recv(torch.empty_like(sent), 0, group=axis.group)  # so that rank 0 goes on
    return found


def test_a_stage_that_sends_something_else_than_the_next_one_receives_is_named() -> None:
    for sent, message in zip(SENT, run(messages_of_receives, 2)[1], strict=True):
        assert f"rank 0 sends {described(sent)} at test_debug_comm.py:" in message
        assert ", and rank 1 receives float32 [4, 2] at test_debug_comm.py:" in message


def numbers_of(rank: int, world_size: int, sections: dict[str, Any], debug_comm: bool) -> list[Any]:
    """Return the loss and the norm of two steps, the bytes that were sent."""
    config = parse(sections, world_size=world_size)
    context = make_context(config, Place(rank, world_size, rank, world_size), debug_comm=debug_comm)
    engine = Engine(models.build(context), context)
    batch = {"input_ids": (torch.arange(8 // engine.data.size * 16).view(-1, 16) * 7 + 1) % 250 + 4}
    found = [engine.train_step(batch) for _ in range(2)]
    return [*((one.loss, one.grad_norm) for one in found), dict(context.mesh.traffic.bytes)]


SMALL = dict(name="opt-tiny", hidden_size=32, ffn_dim=64, num_hidden_layers=4, num_attention_heads=2)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "pipeline": (2, dict(parallel=dict(pipeline=dict(size=2)))),
    "zero 3": (2, dict(zero=dict(stage=3))),
    "tensor and pipeline": (4, dict(parallel=dict(pipeline=dict(size=2), tensor=dict(mode="1d", size=2)))),
    "ring": (2, dict(parallel=dict(context=dict(size=2)))),
    "a v, zero 3": (4, dict(parallel=dict(pipeline=dict(size=2, schedule="zero_bubble_v")), zero=dict(stage=3))),
    "around the pipe, zero 2": (
        6,
        dict(parallel=dict(pipeline=dict(size=3, schedule="interleaved")), zero=dict(stage=2)),
    ),
}


@pytest.mark.parametrize(
    "layout", ["pipeline", "zero 3", *(pytest.param(name, marks=pytest.mark.slow) for name in list(LAYOUTS)[2:])]
)
def test_a_run_whose_collectives_are_compared_has_the_same_numbers_and_traffic(layout: str) -> None:
    world_size, sections = LAYOUTS[layout]
    train = dict(device="cpu", global_batch_size=8, micro_batch_size=2)
    sections = dict(model=SMALL, data=dict(sequence_length=16), train=train) | sections
    assert run(numbers_of, world_size, sections, True) == run(numbers_of, world_size, sections, False)


def leave_one_out(rank: int, folder: Path) -> None:
    context = parallel.launch_from_torch(
        dict(train=dict(device="cpu", timeout_seconds=parting.TIMEOUT)), debug_comm=True
    )
    parting.part(folder)
    all_reduce(X, context.mesh.world)
    if rank == 0:
        all_reduce(X, context.mesh.world)
    else:
        time.sleep(60.0)


def call_another(rank: int, folder: Path) -> None:
    context = parallel.launch_from_torch(dict(train=dict(device="cpu")), debug_comm=True)
    parting.part(folder)
    CALLS["another dtype"][:2][rank](context.mesh.world)


def differ_in_debugging(rank: int, folder: Path) -> None:
    parting.part(folder)
    parallel.launch_from_torch(dict(train=dict(device="cpu")), debug_comm=rank == 1)


@pytest.mark.parametrize(
    ("program", "codes", "text"),
    [
        pytest.param(leave_one_out, (5, 5), "is silent: it has not gone on for 2 s", marks=pytest.mark.slow),
        (call_another, (1, 1), "rank 1: all_reduce (SUM) of bfloat16 [4, 2] at test_debug_comm.py:"),
        (differ_in_debugging, (1, 1), "debug_comm: the ranks were started with different values: False on rank 0,"),
    ],
)
def test_a_launched_program_ends_with_what_differs(
    program: Callable[[int, Path], None], codes: tuple[int, int], text: str
) -> None:
    ends = play(partial(program), 2)
    assert tuple(end.code for end in ends) == codes, ends
    for end in ends:
        assert text in end.errors, end.errors

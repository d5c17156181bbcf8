"""Work in a graph, on a CPU: when it is replayed, and what becomes of the errors of a capture."""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import torch

from parallel.ops.captured import CALLS_BEFORE, Captured, CudaGraph, raising_the_first_error
from tests.rerun_graph import RerunGraph


@pytest.mark.parametrize("waits", [False, True])
def test_each_call_does_its_work_once(waits: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Work that waits for the device cannot be captured, and one line says so."""
    total, graphs = torch.zeros(()), list[RerunGraph]()

    def new_graph() -> RerunGraph:
        graphs.append(RerunGraph())
        return graphs[-1]

    def add() -> None:
        if waits:
            assert total.item() >= 0
        total.add_(1)

    captured = Captured(add, new_graph, what="additions")
    for number in range(CALLS_BEFORE + 3):
        captured()
        assert total.item() == number + 1
    assert [graph.replays for graph in graphs] == [0 if waits else 3]
    assert len([record for record in caplog.records if "additions are not captured" in record.message]) == waits


def test_work_beside_a_graph_is_between_what_comes_before_the_graph_and_what_comes_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is so also where an error ends it, and nobody waits for its result. These streams note what they are given."""
    given = list[str]()

    class Stream:
        device_index = 0

        def __init__(self, name: str) -> None:
            self.name = name

        def wait_event(self, event: str) -> None:
            given.append(f"{self.name} waits for {event}")

        def wait_stream(self, other: "Stream") -> None:
            given.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def stream(current: Stream) -> Iterator[None]:
        given.append(f"in {current.name}")
        yield

    monkeypatch.setattr("torch.cuda.stream", stream)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: Stream("main"))
    graph = CudaGraph.__new__(CudaGraph)
    vars(graph).update(_device=torch.device("cuda"), _stream=Stream("side"), _before="the start of the graph")
    with suppress(KeyboardInterrupt), graph.beside():
        raise KeyboardInterrupt
    assert given == ["side waits for the start of the graph", "in side", "main waits for side"]


@contextmanager
def failing_at_its_end() -> Iterator[None]:
    try:
        yield
    finally:
        raise RuntimeError("the capture was invalidated")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_the_error_of_an_operation_is_raised_and_not_that_of_the_capture_which_it_ends(error: BaseException) -> None:
    """An interrupt would be taken for an error of the device otherwise, and the program would go on."""
    with pytest.raises(type(error)) as raised, raising_the_first_error(failing_at_its_end()):
        raise error
    assert raised.value is error
    with pytest.raises(RuntimeError, match="invalidated"), raising_the_first_error(failing_at_its_end()):
        pass


def test_a_failed_capture_keeps_no_tensors() -> None:
    """They would be there until Python collects its garbage, and steps as usual need their memory at once."""
    kept = list[weakref.ref[torch.Tensor]]()

    def work() -> None:
        x = torch.zeros(1)
        kept.append(weakref.ref(x))
        raise RuntimeError("out of memory")

    gc.disable()
    try:
        with suppress(RuntimeError), raising_the_first_error(failing_at_its_end()):
            work()
        assert kept[0]() is None
    finally:
        gc.enable()

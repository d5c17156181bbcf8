"""A memory that runs out, of the device or of the host, in each phase of a run: who, when, what is held, what helps."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from models.data import Loader
from parallel.chunk.chunk import Chunk
from parallel.engine.context import make_context
from parallel.engine.engine import Engine
from parallel.errors import ExitCode, NoRoomError, RoomError
from parallel.placement import memory_guard
from parallel.placement.held import HeldTensors, held_tensors
from parallel.placement.memory_report import MemoryUse, Shortage, cures_of, report
from parallel.placement.shortage import refusing_without_room
from parallel.storage.no_room import Memory, asked_for, memory_without_room
from parallel.storage.transfer import Tier
from parallel.watch import control_groups
from parallel.watch.beat import Beat
from parallel.watch.control_groups import OomKills, memory_groups, oom_kills
from parallel.watch.host_mates import HostMates
from tests.tables import ROOT
from tests.test_loop import prepared
from training.config import read_config
from training.preview import preview_of
from training.run import make_engine, make_loader

GIB = 2**30
DEVICE_ERROR = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.72 GiB of which 1.00 GiB is"
    " free."
)
HOST_ERROR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    " 4294967296 bytes. Error code 12 (Cannot allocate memory)"
)


def fails(error: BaseException) -> Callable[..., Any]:
    """Return a function that raises a new error like this one."""

    def function(*_: Any, **__: Any) -> None:
        raise type(error)(*error.args)

    return function


def engine_in(folder: Path, *assignments: str) -> tuple[Engine, Loader]:
    """Return an engine before its first step, and its loader."""
    job = prepared(folder, *assignments)
    engine = make_engine(make_context(job.config, job.place), job)
    return engine, make_loader(engine, job)


# -- which errors these are --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "memory", "asked"),
    [
        (DEVICE_ERROR, Memory.DEVICE, 2 * GIB),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), Memory.DEVICE, 0),
        (HOST_ERROR, Memory.HOST, 4 * GIB),
        (RuntimeError("CUDA error: out of memory"), Memory.HOST, 0),
        (MemoryError("Unable to allocate 3.00 GiB for an array with shape (1,)"), Memory.HOST, 3 * GIB),
        (MemoryError("the driver refuses to pin 7 bytes on the host: error 2."), Memory.HOST, 7),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Memory.HOST, 0),
        (RuntimeError("shape '[2]' is invalid"), None, 0),
        (OSError(errno.ENOSPC, "No space left on device"), None, 0),
        (RoomError("can't allocate memory"), None, 0),
    ],
)
def test_an_error_says_which_memory_has_no_room_and_what_was_asked_for(
    error: BaseException, memory: Memory | None, asked: int
) -> None:
    assert memory_without_room(error) is memory
    assert asked_for(error) == asked


def test_torchs_own_error_of_the_host_is_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert memory_without_room(caught.value) is Memory.HOST
    assert asked_for(caught.value) == 2**57


# -- in each phase of a step -------------------------------------------------------------------------------------------


def in_forward(engine: Engine, error: BaseException) -> Any:
    return engine.part.units["layers.1"].register_forward_pre_hook(fails(error))


def in_backward(engine: Engine, error: BaseException) -> Any:
    return engine.part.units["layers.1"].register_full_backward_pre_hook(fails(error))


def in_update(engine: Engine, error: BaseException) -> Any:
    return _Patch(engine.optimizer, "step", error)


def in_reduce(engine: Engine, error: BaseException) -> Any:
    return _Patch(engine.gradients, "finish", error)


def in_data(engine: Engine, error: BaseException) -> Any:
    return _Patch(engine.gradients, "begin", error)


class _Patch:
    """A method of an object that raises an error, until `remove`."""

    def __init__(self, target: object, name: str, error: BaseException) -> None:
        self.target, self.name = target, name
        setattr(target, name, fails(error))

    def remove(self) -> None:
        delattr(self.target, self.name)


PHASES = {
    "forward of layers.1": in_forward,
    "backward": in_backward,
    "reduce": in_reduce,
    "update": in_update,
    "data": in_data,
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Loader]:
    """Return an engine that has taken a step, of which nothing that a test does may change the weights."""
    engine, loader = engine_in(tmp_path_factory.mktemp("run"), "train.precision=bf16")
    engine.train_step(loader.training(0))
    return engine, loader


@pytest.mark.parametrize("error", [DEVICE_ERROR, HOST_ERROR], ids=["device", "host"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_memory_that_runs_out_in_a_step_is_told_with_the_phase_and_the_largest_tensors(
    phase: str, error: BaseException, running: tuple[Engine, Loader]
) -> None:
    engine, loader = running
    patch = PHASES[phase](engine, error)
    try:
        with pytest.raises((NoRoomError, RoomError)) as caught:
            engine.train_step(loader.training(0))
    finally:
        patch.remove()
    assert caught.value.code == ExitCode.NO_ROOM
    first, *others = str(caught.value).splitlines()
    place = "cpu" if error is DEVICE_ERROR else "the host"
    asked = "2.00 GiB" if error is DEVICE_ERROR else "4.00 GiB"
    step = engine.num_steps + 1
    assert first.startswith("rank 0 on ")
    assert f": no room in the memory of {place} at step {step}, {phase}: {asked} more were asked for, " in first
    assert " are free. Try " in first
    assert len(others) <= 11
    assert any(line.endswith("moments of embed") for line in others)
    assert "in this order: " in others[-1]


def test_an_evaluation_that_has_no_memory_is_told_of(running: tuple[Engine, Loader]) -> None:
    engine, loader = running
    patch = in_forward(engine, DEVICE_ERROR)
    try:
        with pytest.raises(NoRoomError, match=rf"at an evaluation after step {engine.num_steps}: 2\.00 GiB"):
            engine.evaluate([loader.training(0)])
    finally:
        patch.remove()


@pytest.mark.parametrize("phase", PHASES)
def test_before_a_step_is_complete_a_memory_without_room_is_a_refusal(phase: str, tmp_path: Path) -> None:
    engine, loader = engine_in(tmp_path)
    PHASES[phase](engine, DEVICE_ERROR)
    with pytest.raises(RoomError, match=rf"at step 1, {phase}: ") as caught:
        engine.train_step(loader.training(0))
    assert caught.value.code == ExitCode.REFUSED


def test_a_disk_of_states_without_room_in_the_middle_of_a_run_is_no_refusal(running: tuple[Engine, Loader]) -> None:
    engine, loader = running
    patch = in_update(engine, RoomError("zero.nvme_dir: /nvme has no room for 4096 bytes of moments."))
    try:
        with pytest.raises(NoRoomError, match=r"zero\.nvme_dir: /nvme has no room"):
            engine.train_step(loader.training(0))
    finally:
        patch.remove()


def test_other_errors_are_raised_as_they_are(running: tuple[Engine, Loader]) -> None:
    engine, loader = running
    for error in (RuntimeError("shape '[2]' is invalid"), OSError(errno.EACCES, "Permission denied")):
        patch = in_forward(engine, error)
        with pytest.raises(type(error)) as caught:
            engine.train_step(loader.training(0))
        patch.remove()
        assert caught.value.args == error.args


# -- what the message says ---------------------------------------------------------------------------------------------


def test_all_that_the_chunks_and_the_optimizer_hold_is_in_the_list(tmp_path: Path) -> None:
    """The reference is the engine's own count of bytes by tier, which a test compares with the allocator."""
    for assignments in (("train.precision=bf16",), (), ("zero.tensor_placement_policy=cpu", "train.precision=bf16")):
        engine, loader = engine_in(tmp_path, *assignments)
        engine.train_step(loader.training(0))
        found = held_tensors(engine.chunks, engine.optimizer.state_bytes)
        by_tier = dict.fromkeys(Tier, 0)
        for one in found:
            by_tier[one.tier] += one.num_bytes
        assert by_tier == engine.held()
        assert [one.num_bytes for one in found] == sorted((one.num_bytes for one in found), reverse=True)


def shortage_of(**changes: Any) -> Shortage:
    values = dict(
        memory=Memory.DEVICE,
        device=torch.device("cuda", 0),
        who="rank 1 on node7",
        when="step 13, forward of layers.7",
        asked=2 * GIB,
        words="CUDA out of memory",
        use=MemoryUse(free=GIB, allocated=100 * GIB, reserved=101 * GIB),
    )
    return Shortage(**{**values, **changes})


HELD = [
    HeldTensors("moments", "layers.3", Tier.DEVICE, 20 * GIB),
    HeldTensors("master weights", "layers.3", Tier.DEVICE, 10 * GIB),
    HeldTensors("gradients", "layers.3", Tier.HOST, 5 * GIB),
]


def test_the_message_says_what_was_predicted_what_is_held_and_what_is_lost_between_tensors() -> None:
    config = read_config(None, ["train.micro_batch_size=8", "train.global_batch_size=8"], 1)
    text = report(shortage_of(), HELD, config, predicted=33 * GIB, num_replicas=2)
    assert text.splitlines()[:3] == [
        "rank 1 on node7: no room in the memory of cuda:0 at step 13, forward of layers.7: 2.00 GiB more were asked"
        " for, 1.00 GiB are free. Try train.micro_batch_size=4.",
        "held there: moments 20.00 GiB, master weights 10.00 GiB, activations and all else 70.00 GiB, reserved by torch"
        " and not used 1.00 GiB",
        "parameters, gradients and states: --check predicts 33.00 GiB for this rank, it holds 35.00 GiB now;"
        " activations come on top",
    ]
    assert len(text.splitlines()) <= 12


def test_what_helps_comes_in_the_order_of_what_takes_the_memory() -> None:
    config = read_config(None, ["train.micro_batch_size=8", "train.global_batch_size=8"], 1)

    def cures(**changes: Any) -> list[str]:
        return [cure.partition(" ")[0] for cure in cures_of(shortage_of(**changes), HELD[:2], config, num_replicas=2)]

    activations = ["train.micro_batch_size=4", "train.activation_checkpointing='full'"]
    model = ["zero.stage=1", "zero.tensor_placement_policy='auto'", "optimizer.state_dtype='bf16'"]
    assert cures() == [*activations, *model, "parallel.tensor"]
    assert cures(use=MemoryUse(GIB, 31 * GIB, 32 * GIB)) == [*model, *activations, "parallel.tensor"]
    in_pieces = cures(use=MemoryUse(GIB, 100 * GIB, 103 * GIB))
    assert in_pieces == ["PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True", *activations, *model, "parallel.tensor"]
    assert cures(memory=Memory.HOST) == ["zero.stage=1", "optimizer.state_dtype='bf16'", "parallel.tensor"]


def test_what_helps_is_a_config_that_is_accepted() -> None:
    for size in (2, 3, 6, 8):
        config = read_config(None, [f"train.micro_batch_size={size}", "train.global_batch_size=24"], 1)
        for cure in cures_of(shortage_of(), HELD, config):
            if "=" in cure and cure.startswith(("train", "zero", "optimizer")):
                read_config(None, [f"train.micro_batch_size={size}", "train.global_batch_size=24", cure], 1)


def test_the_first_line_alone_is_told_where_the_error_says_nothing_of_sizes(
    running: tuple[Engine, Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, loader = running
    monkeypatch.setattr(memory_guard, "use_of", lambda memory, device: MemoryUse(free=GIB))
    monkeypatch.setattr(engine.memory_guard, "predicted", preview_of(engine.config, 1).parts[0].total_bytes)
    patch = in_update(engine, MemoryError())
    try:
        with pytest.raises(NoRoomError) as caught:
            engine.train_step(loader.training(0))
    finally:
        patch.remove()
    lines = str(caught.value).splitlines()
    assert "step 2, update: MemoryError, 1.00 GiB are free. Try optimizer.state_dtype='bf16'." in lines[0]
    assert "--check predicts 1." in lines[2]


# -- at the start ------------------------------------------------------------------------------------------------------


def test_a_model_that_the_host_has_no_memory_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Chunk, "__init__", fails(HOST_ERROR))
    with pytest.raises(RoomError, match=r"no room in the memory of the host at making the model: 4\.00 GiB"):
        engine_in(tmp_path)


def test_what_has_no_room_before_the_first_step_names_the_rank_and_the_work() -> None:
    words = r"^rank 2 on .*: no room in the memory of the device at loading: 2\.00 GiB"
    with pytest.raises(RoomError, match=words), refusing_without_room(2, "loading"):
        raise DEVICE_ERROR


@contextmanager
def address_space(num_bytes: int) -> Iterator[None]:
    """Let this process have only so many bytes of addresses more than it has."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_limit_of_the_address_space_is_a_memory_without_room(running: tuple[Engine, Loader]) -> None:
    """It is the limit that a scheduler sets with `ulimit -v`: torch, NumPy and Python each meet it in their own way."""
    engine, _ = running
    for take in (lambda: torch.empty(2**30), lambda: bytearray(2**32), lambda: torch.zeros(2**29).numpy().copy()):
        explained = engine.memory_guard.explained(lambda: "an evaluation")
        with address_space(2**28), pytest.raises(NoRoomError, match="no room in the memory of the host"), explained:
            take()


# -- the system kills a process ----------------------------------------------------------------------------------------


def groups_in(folder: Path, version: int, kills: int) -> tuple[Path, Path]:
    """Make control groups of a version as the system shows them; return their folder, and the file of the process."""
    own = folder / "cgroup"
    if version == 2:
        group = folder / "groups" / "user" / "run"
        own.write_text("0::/user/run\n")
        file, content = "memory.events", f"low 0\nhigh 0\nmax 12\noom 3\noom_kill {kills}\noom_group_kill 0\n"
    else:
        group = folder / "groups" / "memory" / "user" / "run"
        own.write_text("3:cpu:/user/run\n4:memory:/user/run\n")
        file, content = "memory.oom_control", f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n"
    group.mkdir(parents=True, exist_ok=True)
    (group / file).write_text(content)
    (group.parent / file).write_text(content.replace(f"oom_kill {kills}", "oom_kill 99"))  # of others, too
    return folder / "groups", own


@pytest.mark.parametrize("version", [1, 2])
def test_the_processes_that_the_system_killed_for_memory_are_counted(version: int, tmp_path: Path) -> None:
    groups, own = groups_in(tmp_path, version, 4)
    assert oom_kills(groups, own) == 4
    assert next(memory_groups(groups, own))[0] == version
    assert oom_kills(groups, tmp_path / "none") is None
    assert oom_kills(tmp_path / "none", own) is None


class _Board:
    """A board with the beats of two ranks, of which the second has no process any more."""

    rank = 0

    def __init__(self) -> None:
        self.posted: list[Beat] = []

    def beats(self, ranks: object) -> list[Beat]:
        return [Beat(1, "node7", process="gone 1 1", step=12)]

    def post(self, beat: Beat) -> None:
        self.posted.append(beat)


def test_a_rank_that_the_system_killed_for_memory_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [4]
    monkeypatch.setattr(control_groups, "oom_kills", lambda: counts[0])
    monkeypatch.setattr("parallel.watch.host_mates.has_ended", lambda process: True)
    ends = []
    for grows in (False, True):
        board: Any = _Board()
        mates, kills = HostMates(board, [0, 1]), OomKills()
        counts[0] += grows
        mates.tick()
        ends.append(board.posted[0].end)
        assert bool(kills.explanation()) == grows
    assert "its process was killed, or ended without a word" in ends[0]
    assert ends[1] == (
        "rank 1 on node7 ended after step 12: killed by the system, which had no memory left on this host"
    )


# -- whole runs --------------------------------------------------------------------------------------------------------

EXHAUST = """
import os
import torch
from training.callbacks import Callback
from parallel.engine.base import EngineBase
from parallel.engine.engine import Engine
from parallel.optim.adamw import AdamW
from parallel.pipeline.part import ModelPart

PLACES = {
    "forward": (ModelPart, "forward"),
    "backward": (torch.autograd, "backward"),
    "update": (AdamW, "step"),
    "data": (Engine, "_microbatches"),
    "evaluation": (ModelPart, "eval"),
    "save": (EngineBase, "state"),
    "export": (EngineBase, "weights"),
}

class Exhaust(Callback):
    on_every_rank = True

    def on_start(self, run):
        self.rank = run.rank
        self.exhaust(0)

    def on_step(self, line):
        self.exhaust(line["step"])

    def exhaust(self, step):
        if self.rank == 1 and step == int(os.environ["EXHAUST_AFTER"]):
            def fail(*_, **__):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            setattr(*PLACES[os.environ["EXHAUST"]], fail)
"""


def ends_of_run(
    folder: Path, place: str, after: int, *assignments: str, source: str = EXHAUST
) -> subprocess.CompletedProcess[str]:
    """Train on two ranks, of which rank 1 alone has no memory at this place after so many steps."""
    (folder / "exhaust.py").write_text(source)
    values = (
        *("model.hidden_size=32", "model.ffn_dim=64", "model.num_hidden_layers=2", "data.sequence_length=32"),
        *("train.steps=4", "train.timeout_seconds=5", f"output.dir={folder / 'run'}"),
        *("output.checkpoint_every=1", "output.callbacks=['exhaust.py:Exhaust']", *assignments),
    )
    command = [sys.executable, "-m", "colonnade", "train", "--nprocs", "2", "--set", *values]
    variables = {"EXHAUST": place, "EXHAUST_AFTER": str(after), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment = os.environ | variables
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )


def check_end(done: subprocess.CompletedProcess[str], code: int, when: str) -> None:
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("rank 1 on "), done.stderr
    assert f": no room in the memory of cpu at {when}" in lines[0], done.stderr
    assert "2.00 GiB more were asked for" in lines[0]
    assert "Traceback" not in done.stderr
    assert len(lines) <= 12, done.stderr


def test_a_rank_that_alone_has_no_memory_in_a_step_ends_all_by_name(tmp_path: Path) -> None:
    done = ends_of_run(tmp_path, "backward", 2)
    check_end(done, 6, "step 3, backward")
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step_000002\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "after", "when"),
    [
        ("forward", 0, "step 1, forward"),
        ("forward", 1, "step 2, forward"),
        ("update", 0, "step 1, update"),
        ("update", 3, "step 4, update"),
        ("data", 3, "step 4, data"),
        ("evaluation", 3, "an evaluation after step 4"),
        ("save", 2, "a checkpoint"),
        ("export", 4, "an export"),
    ],
)
def test_in_every_phase_one_rank_without_memory_ends_all_by_name(
    place: str, after: int, when: str, tmp_path: Path
) -> None:
    evaluates = ("output.eval_every=4",) if place == "evaluation" else ()
    done = ends_of_run(tmp_path, place, after, *evaluates)
    if place in ("save", "export"):
        assert "no room in the memory of cpu at " in done.stderr
        assert done.returncode == 6
    else:
        check_end(done, 2 if after == 0 else 6, when)


# -- a real GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_gpu_that_runs_out_says_what_torch_has_reserved(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    engine, loader = engine_in(tmp_path, "train.device=cuda")
    engine.train_step(loader.training(0))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**20) / total)
    hook = engine.part.units["layers.1"].register_forward_pre_hook(
        lambda *_: torch.empty(2**30, device="cuda", dtype=torch.uint8)
    )
    try:
        with pytest.raises(NoRoomError) as caught:
            engine.train_step(loader.training(0))
    finally:
        hook.remove()
        torch.cuda.set_per_process_memory_fraction(1.0)
    first, held, *_ = str(caught.value).splitlines()
    assert "no room in the memory of cuda:0 at step 2, forward of layers.1: 1.00 GiB more were asked for" in first
    assert "reserved by torch and not used" in held

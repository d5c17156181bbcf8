"""Rules for every test: hypothesis repeats its examples, torch sees no GPU unless asked, and nothing is left behind.

The suite runs on the CPU, also on a machine that has GPUs: CUDA_VISIBLE_DEVICES is empty before torch is imported, in
this process and in all that the tests start. `pytest --gpu` leaves the GPUs visible and runs the tests marked `gpu`,
and only these, a second time: in them the configs' default, `train.device="auto"`, chooses a GPU.
"""

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.once import FOLDER
from tests.patience import patient

# The same examples every time: a run that is red on one machine is red on all. No deadline, for the cores are shared.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")

SECONDS_OF_A_TEST = 1800.0  # reached only by a test that hangs outside of `harness.run`, which has its own limit


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="let torch see the GPUs, and run only the tests marked gpu")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["COLONNADE_CACHE"] = tempfile.mkdtemp(prefix="colonnade-cache-")  # and not the one of the user
    if not hasattr(config, "workerinput"):  # workers have the variables of the process that starts them
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="colonnade-tests-")
    if not config.getoption("--gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    import torch

    if not torch.cuda.device_count():  # which, unlike is_available, starts nothing in this process
        if Path("/dev/nvidiactl").exists():
            pytest.exit("this machine has an NVIDIA GPU, but torch sees none: the driver or torch's build is wrong", 1)
        pytest.exit("torch sees no GPU here, so the tests marked gpu are not run a second time", 0)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["COLONNADE_CACHE"], ignore_errors=True)
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ[FOLDER], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        limit = item.get_closest_marker("timeout")
        seconds = patient(limit.args[0] if limit is not None else SECONDS_OF_A_TEST)
        item.add_marker(pytest.mark.timeout(seconds), append=False)
    if config.getoption("--gpu"):
        chosen = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture
def gpu() -> None:
    """Skip a test where torch sees no GPU.

    A module must not ask while it is imported: `is_available` starts CUDA, and no process that is forked later has it.
    """
    import torch

    if not torch.cuda.device_count():
        pytest.skip("there is no GPU")


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    """Fail a test that leaves behind a process or an environment variable, which could disturb the next test."""
    before = _environment()
    yield
    assert multiprocessing.active_children() == []
    assert _environment() == before


def _environment() -> dict[str, str]:
    """Return os.environ without what is set once in a process, and rightly stays.

    pytest notes the current test there, torch's compiler sets folders and programs of its own, and `make_context` sets
    how the allocator works before this process first uses a GPU. scikit-learn, which transformers imports to generate
    where it is installed, sets two variables of OpenMP.
    """
    own = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "PYTORCH_CUDA_ALLOC_CONF"}
    own |= {"KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "TRITON_CACHE_DIR", "TRITON_PTXAS_PATH"}
    return {name: value for name, value in os.environ.items() if name not in own}

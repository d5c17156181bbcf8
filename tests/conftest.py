"""What holds for every test."""

import multiprocessing
import os
from collections.abc import Iterator

import hypothesis
import pytest

# The same examples every time: a run that is red on one machine is red on all. No deadline, for the cores are shared.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    """A test leaves no process and no environment variable for the next one to trip over."""
    before = _environment()
    yield
    assert multiprocessing.active_children() == []
    assert _environment() == before


def _environment() -> dict[str, str]:
    """os.environ without what pytest itself notes there, and what torch does when it first imports its compiler."""
    own = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}
    return {name: value for name, value in os.environ.items() if name not in own}

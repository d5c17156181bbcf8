"""Values that no message was made for: long paths, surrogates, numbers without end. Each is still answered in words."""

import time
from pathlib import Path

import pytest

from models.shapes import resolve
from parallel.config import load_raw, parse
from parallel.engine.context import Place, make_context
from parallel.errors import SHOWN, ConfigError, DataError, shortened
from parallel.mesh.agreement import Agreement
from tests.harness import run
from tests.patience import patient

SURROGATE = "\ud800"


def refusal_in(world_size: int | None, **sections: object) -> str:
    """Return the message with which a config is refused in a world of this size."""
    with pytest.raises(ConfigError) as caught:
        parse(sections, world_size=world_size, resolve=resolve)
    return str(caught.value)


def test_layers_of_ten_thousand_stages_are_not_repeated_in_whole() -> None:
    assert len(refusal_in(None, parallel=dict(pipeline=dict(layers=(1,) * 10_000)))) < 2 * SHOWN


def test_a_key_that_no_encoding_can_write_is_named_so_that_it_can_be_printed() -> None:
    assert r"train.'\ud800'" in refusal_in(None, train={SURROGATE: 1}).encode().decode()


def test_a_world_without_end_is_refused_within_a_second() -> None:
    """The divisors of the world size were searched for advice, which takes minutes for 10²⁰ ranks."""
    began = time.perf_counter()
    assert "is not a multiple of pipeline 3" in refusal_in(10**20, parallel=dict(pipeline=3))
    assert time.perf_counter() - began < patient(1.0)


def test_a_message_has_200_characters_of_a_long_path_at_most(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 240) / ("b" * 240)
    for error in (DataError(f"data.path: {folder} is empty."), ConfigError(f"model.path: {folder} is empty.")):
        assert str(error).split()[1] == shortened(str(folder))
        assert str(error).endswith(" is empty.")


def test_a_folder_in_place_of_a_config_is_not_advised_itself(tmp_path: Path) -> None:
    (tmp_path / "config.py").mkdir()
    with pytest.raises(ConfigError, match=r"^config: \S+ is a folder, and not a regular file\.$"):
        load_raw(tmp_path / "config.py")


def disagree(rank: int, world_size: int) -> list[str]:
    """Return the messages of two agreements in which rank 1 has a problem: one that is long, one with a surrogate."""
    context = make_context(parse(dict(train=dict(device="cpu"))), Place(rank, world_size))
    agreement, messages = Agreement(context.mesh.world), []
    for problem in (f"batch: {'long ' * 100}. Try another.", f"batch: {SURROGATE} is no key."):
        with pytest.raises(DataError) as caught:
            agreement.agree_on("a batch", problem=problem if rank == 1 else "", error=DataError)
        messages.append(str(caught.value))
    return messages


def test_a_problem_of_one_rank_is_told_to_the_end_and_whatever_characters_it_has() -> None:
    """Messages were cut off after 256 bytes, and a surrogate raised an error on its own rank alone."""
    for long, odd in run(disagree, 2):
        assert long.startswith("rank 1: batch: long")
        assert long.endswith("Try another.")
        assert odd == f"rank 1: batch: {SURROGATE} is no key."

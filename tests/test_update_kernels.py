"""The kernels of an update on a GPU: the cases are those of the interpreted programs."""

import pytest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("gpu"),
]


def test_an_update_by_the_kernel_is_as_exact_as_torchs_and_rounds_with_the_same_noise() -> None:
    from tests.interpreted import adamw

    adamw.check("cuda")


def test_sums_of_squares_are_as_exact_as_torchs_and_the_same_in_any_company() -> None:
    from tests.interpreted import sums

    sums.check("cuda")

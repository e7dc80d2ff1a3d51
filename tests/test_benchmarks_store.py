"""The benchmarks of the store run and check themselves, at sizes that take seconds."""

from collections.abc import Callable, Iterator

import pytest

from tests.benchmarks import store
from tests.benchmarks.harness import Figure
from tests.benchmarks.rows import CELL_ROWS

TINY: dict[str, tuple[int, Callable[[], Iterator[Figure]]]] = {
    "commit": (3, lambda: store.commit(28, times=1)),
    "corr": (1, lambda: store.corr(2 * CELL_ROWS, times=1)),
    "query": (4, lambda: store.query(12, times=1)),
    "row_bytes": (1, lambda: store.row_bytes(20)),
    "startup": (3, lambda: store.startup(1, n=3)),
    "store_curve": (6, lambda: store.store_curve((CELL_ROWS + 2,), times=1)),
}


@pytest.mark.parametrize("name", TINY)
def test_a_benchmark_measures_what_it_says(name: str) -> None:
    """Its own gates hold, and every figure is a positive number that says what it is of."""
    count, run = TINY[name]
    figures = list(run())
    assert len(figures) == count
    assert len({figure.what for figure in figures}) == count
    assert all(sample > 0 for figure in figures for sample in figure.samples)


def test_a_row_of_a_compacted_study_is_small() -> None:
    """With three noisy curves of 30 epochs a row takes no more than was asked for."""
    (figure,) = store.row_bytes(700)
    assert figure.verdict == "aim", figure.median

"""Work ahead: the same results in the same order, never too many at a time."""
import threading
from collections.abc import Iterator

import pytest

from nnunet_transplant.parallel import ahead


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_results_come_in_order_and_few_wait(workers: int) -> None:
    given: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            given.append(item)
            yield item

    for taken, result in enumerate(ahead(lambda item: item ** 2, items(), workers)):
        assert result == taken ** 2
        assert len(given) <= taken + 1 + workers


def test_several_work_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=30)  # nobody passes it alone
    assert list(ahead(lambda _: both.wait() < 2, range(4), 2)) == [True] * 4


def test_an_error_comes_where_its_result_would() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("the third")
        return item

    found = []
    with pytest.raises(ValueError, match="the third"):
        for result in ahead(work, range(100), 2):
            found.append(result)
    assert found == [0, 1, 2]


def test_who_has_enough_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    results = ahead(lambda item: item, range(100), 4)
    assert next(results) == 0
    results.close()
    assert threading.active_count() == before

"""Work on several items at once, with results in order."""

import threading
import time
from collections.abc import Iterator

import pytest

from unfreeze.parallel import in_order


def test_results_are_in_the_order_of_the_items_whoever_is_first() -> None:
    def work(item: int) -> int:
        time.sleep(0.02 * (item % 3))
        return item * item

    assert list(in_order(work, range(20), 2, threads=4)) == [i * i for i in range(20)]


def test_as_many_threads_work_at_once_as_are_asked_for() -> None:
    together = threading.Barrier(4, timeout=60)  # fewer threads would wait forever
    assert len(list(in_order(lambda _: together.wait(), range(8), 1, threads=4))) == 8


def test_an_error_is_raised_when_its_turn_comes() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("image 3")
        return item

    seen = []
    with pytest.raises(ValueError, match="image 3"):
        seen.extend(in_order(work, range(10), 1, threads=2))
    results = in_order(work, range(10), 1, threads=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_consumer_that_stops_ends_the_work(ahead: int) -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    results = in_order(lambda item: item, items(), ahead, threads=2)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert len(taken) <= 2 * ahead
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]

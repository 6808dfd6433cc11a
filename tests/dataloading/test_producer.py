"""The background thread: order, bounded lead, failures."""

from __future__ import annotations

import threading
import time

import pytest

from mlip.dataloading.ledger import DataError
from mlip.dataloading.producer import Producer


class Maker:
    def __init__(self, fails_at: int = -1) -> None:
        self.made: list[int] = []
        self.fails_at = fails_at

    def make(self, step: int) -> int:
        if step == self.fails_at:
            raise OSError("disk")
        self.made.append(step)
        return step * 10


def test_items_come_in_order_and_no_more_than_prefetch_ahead() -> None:
    maker = Maker()
    producer = Producer(maker.make, 4, None, prefetch=2)
    assert [producer.take() for _ in range(3)] == [40, 50, 60]
    time.sleep(0.1)
    # two wait in the queue and one more is in the thread's hand
    assert max(maker.made) <= 6 + 3
    producer.stop()


def test_a_failure_arrives_in_its_place_and_stays() -> None:
    maker = Maker(fails_at=2)
    producer = Producer(maker.make, 0, None, prefetch=4)
    assert [producer.take(), producer.take()] == [0, 10]
    for _ in range(2):
        with pytest.raises(OSError, match="disk"):
            producer.take()
    producer.stop()


def test_it_ends_by_itself_before_the_last_step() -> None:
    maker = Maker()
    producer = Producer(maker.make, 0, 3, prefetch=8)
    assert [producer.take() for _ in range(3)] == [0, 10, 20]
    producer.stop()
    assert maker.made == [0, 1, 2]


def test_a_read_that_hangs_is_an_error_after_the_asked_time() -> None:
    hung = threading.Event()

    class Hanging:
        def make(self, step: int) -> int:
            if step == 1:
                hung.wait(60)
            return step

    maker = Hanging()
    producer = Producer(maker.make, 0, None, prefetch=1)
    assert producer.take(timeout_s=30) == 0
    for _ in range(2):  # and it stays an error
        with pytest.raises(DataError, match="no batch for 0.2 s.*run.timeout_s"):
            producer.take(timeout_s=0.2)
    hung.set()
    producer.stop()

"""The background thread: order, bounded lead, failures."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from mlip.dataloading.ledger import DataError
from mlip.dataloading.pipelines.producer import Producer, _stop_all


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
    assert [producer.take(60) for _ in range(3)] == [40, 50, 60]
    time.sleep(0.1)
    # two wait in the queue and one more is in the thread's hand
    assert max(maker.made) <= 6 + 3
    producer.stop()


def test_a_failure_arrives_in_its_place_and_stays() -> None:
    maker = Maker(fails_at=2)
    producer = Producer(maker.make, 0, None, prefetch=4)
    assert [producer.take(60), producer.take(60)] == [0, 10]
    for _ in range(2):
        with pytest.raises(OSError, match="disk"):
            producer.take(60)
    producer.stop()


def test_it_ends_by_itself_before_the_last_step() -> None:
    maker = Maker()
    producer = Producer(maker.make, 0, 3, prefetch=8)
    assert [producer.take(60) for _ in range(3)] == [0, 10, 20]
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


def test_a_thread_that_could_not_be_started_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the end of the process that was a traceback."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    maker = Maker()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        Producer(maker.make, 0, None, 2)
    _stop_all()


def test_at_the_end_of_a_process_the_thread_stops_before_libraries_do() -> None:
    """One that outlives DALI's own end sees its pipeline vanish and builds a new one."""
    script = """
import threading
from mlip.dataloading.pipelines.producer import Producer
import atexit
# as a library does that is imported later than the producer
atexit.register(lambda: print([t.name for t in threading.enumerate() if "mlip" in t.name]))
class Maker:
    def make(self, step):
        return step
maker = Maker()
producer = Producer(maker.make, 0, None, prefetch=2)
assert producer.take(60) == 0 and "mlip-loader" in [t.name for t in threading.enumerate()]
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "[]\n", "")

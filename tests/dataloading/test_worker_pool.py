"""A worker that crashes, hangs or babbles costs its own item; order and every other item hold."""

import errno
import subprocess
import time
from typing import Any

import pytest

from mlip.dataloading.prepare.worker_pool import WorkerError, WorkerPool

# waits, dies or echoes as the item says; "once" dies only the first time any worker meets it
WORKER = """
import json, os, sys, time
print("ready", flush=True)
for line in sys.stdin:
    item = json.loads(line)
    kind = item.get("kind")
    if kind == "once" and not os.path.exists(item["flag"]):
        open(item["flag"], "w").close()
        os.abort()
    if kind == "abort":
        os.abort()
    if kind == "hang":
        time.sleep(600)
    while kind == "spin":
        pass
    if kind == "half":
        sys.stdout.write('{"size": 10}\\\\nabc'.replace("\\\\n", chr(10)))
        sys.stdout.flush()
        os._exit(0)
    time.sleep(item.get("wait", 0))
    content = str(item["n"]) * 3
    sys.stdout.write(json.dumps({"n": item["n"], "size": len(content)}) + chr(10) + content)
    # two answers at a time: each pair is written at once
    if not item.get("burst") or item["n"] % 2:
        sys.stdout.flush()
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "echo_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "echo_worker"


def test_answers_that_arrive_together_are_all_taken(module):
    """A buffered pipe would hold the second answer back until a third one came."""
    items = [{"n": i, "burst": True} for i in range(200)]
    with WorkerPool(module, "", 1, timeout_s=60, wall_s=60) as pool:
        start = time.process_time()
        replies = list(pool.ordered(items))
    assert [reply.fields["n"] for reply in replies] == list(range(200))
    assert not any(reply.fault for reply in replies) and time.process_time() - start < 5


@pytest.mark.parametrize("count", [1, 3])
def test_answers_come_in_the_order_of_the_items(module, count):
    items = [{"n": i, "wait": 0.02 * (i % 3 == 0)} for i in range(60)]
    with WorkerPool(module, "", count, timeout_s=60) as pool:
        replies = list(pool.ordered(items))
    assert [reply.fields["n"] for reply in replies] == list(range(60))
    assert [reply.content for reply in replies] == [(str(i) * 3).encode() for i in range(60)]


def test_bad_items_cost_themselves_alone(module, tmp_path):
    items = [{"n": i} for i in range(20)]
    items[3]["kind"] = "abort"
    items[4]["kind"] = "half"
    items[9]["kind"] = "hang"
    items[12]["kind"] = "spin"
    items[15] |= {"kind": "once", "flag": str(tmp_path / "flag")}
    items[19]["kind"] = "abort"
    with WorkerPool(module, "", 2, timeout_s=0.5, wall_s=5) as pool:
        replies = list(pool.ordered(items))
    faults = {i: reply.fault for i, reply in enumerate(replies) if reply.fault}
    assert faults == {3: "crashed", 4: "crashed", 9: "timeout", 12: "timeout", 19: "crashed"}
    assert all(r.content == (str(i) * 3).encode() for i, r in enumerate(replies) if not r.fault)


def test_items_are_read_only_a_few_ahead(module):
    taken = []

    def items():
        for i in range(500):
            taken.append(i)
            yield {"n": i}

    with WorkerPool(module, "", 1, timeout_s=60) as pool:
        replies: Any = pool.ordered(items())  # a generator, which has close()
        next(replies)
        assert len(taken) <= 10
        replies.close()


def test_no_worker_outlives_the_pool(module):
    with WorkerPool(module, "", 2, timeout_s=60) as pool:
        processes = [worker.process for worker in pool._workers]
        list(pool.ordered([{"n": 1}]))
    assert all(process.poll() is not None for process in processes)


def test_workers_that_cannot_start_are_an_error_and_no_items_fault(tmp_path, monkeypatch):
    """A limit of the account let none start: every image of the set was refused as "crashed"."""
    (tmp_path / "no_worker.py").write_text("raise SystemExit(7)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with WorkerPool("no_worker", "", 2, timeout_s=60) as pool:
        with pytest.raises(WorkerError, match=r"5 worker processes .* \(status 7\): .*ulimit -v"):
            list(pool.ordered({"n": i} for i in range(9)))


def test_a_worker_that_no_process_is_left_for_names_the_limit(monkeypatch):
    """The output folder was said to be one that cannot be written."""

    def refuse(*args, **named):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(WorkerError, match=r"cannot be started: .*ulimit -u"):
        WorkerPool("worker", "", 2, timeout_s=60)


def test_a_worker_that_does_not_start_once_costs_no_item(tmp_path, module):
    first = """
import os, sys
if not os.path.exists(sys.argv[1]):
    open(sys.argv[1], "w")
    sys.exit(1)
"""
    (tmp_path / "late_worker.py").write_text(first + WORKER)
    with WorkerPool("late_worker", str(tmp_path / "flag"), 1, timeout_s=60) as pool:
        replies = list(pool.ordered({"n": i} for i in range(9)))
    assert [reply.fields["n"] for reply in replies] == list(range(9))

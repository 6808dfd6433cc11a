"""A background thread that makes items ahead of need, in order, and hands failures over."""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

from mlip.dataloading.ledger import DataError

_POLL_S = 0.1  # how soon the thread notices that nobody wants its items any more
_HANGS_S = 10.0  # a thread that takes longer to end hangs in the file system, which nothing ends


class Producer:
    """make(step) for step = first, first + 1, ... before last (None = endless).

    `make` is a bound method, held weakly: an owner that nobody keeps ends the thread.
    """

    def __init__(
        self, make: Callable[[int], Any], first: int, last: int | None, prefetch: int
    ) -> None:
        self._make = weakref.WeakMethod(make)
        self._queue: queue.Queue[Any] = queue.Queue(prefetch)
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(first, last), name="mlip-loader", daemon=True
        )
        # again, as functions registered later run earlier: DALI's, registered at its import, takes
        # the running pipeline away, and the thread would build a new one while the process ends
        atexit.unregister(_stop_all)
        atexit.register(_stop_all)
        self._thread.start()
        _running.add(self)  # one that could not be started cannot be joined

    def take(self, timeout_s: float) -> Any:
        """The next item; a failure of make() is raised here, and again at every later call.

        Units:   timeout_s seconds of waiting for one item
        Raises:  DataError where make() does not come back in time: a file system that hangs gives
                 no error of its own, and a run that waits for ever holds its GPUs.
        """
        if self._failure is not None:
            raise self._failure
        try:
            item = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            self._failure = DataError(
                f"no batch for {timeout_s:g} s (run.timeout_s): the file system of data.root "
                "hangs, or the files are too large for this time; mend it and resume"
            )
            raise self._failure from None
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        return item

    def stop(self) -> None:
        """End the thread; what it made ahead is dropped. One that hangs in a read is left to it."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join(_HANGS_S)

    def _run(self, step: int, last: int | None) -> None:
        try:
            while (last is None or step < last) and not self._stopped.is_set():
                make = self._make()
                if make is None:
                    return
                item = make(step)
                del make
                self._put(item)
                step += 1
        except StopIteration as error:
            # an iterator's end inside a library must not look like the end of an epoch
            failure = DataError("the input pipeline raised StopIteration: a fault in a library")
            failure.__cause__ = error
            self._put(failure)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stopped.is_set() and self._make() is not None:
            try:
                self._queue.put(item, timeout=_POLL_S)
                return
            except queue.Full:
                continue


_running: weakref.WeakSet[Producer] = weakref.WeakSet()


def _stop_all() -> None:
    # a thread inside a decoder while the interpreter shuts down can crash the process
    for producer in list(_running):
        producer.stop()

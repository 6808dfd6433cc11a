"""Times of one engine's steps: the whole without any extra wait, then its parts in another pass.

On a GPU by CUDA events, which the device records as it comes to them; on a CPU by the clock of the
process, so that other work on the machine changes little.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mlip.batch import Batch

PARTS = (
    "data",
    "vision forward",
    "text forward",
    "heads and losses forward",
    "backward",
    "towers again",
    "optimiser",
    "between",
)
PROGRESS = 2.0  # epochs: prototypes learn from the first on
LR = 1e-5


class Clock:
    """Points in the device's time, and the milliseconds between two of them."""

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"

    def now(self) -> Any:
        if not self.is_gpu:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) if self.is_gpu else 1e3 * (end - begin)

    def settle(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()


class Runner:
    """Steps of an engine over a few batches in turn, each with its own step number.

    As in the training loop on a GPU, a step's numbers are read when the next one is queued.
    """

    def __init__(self, engine: Any, batches: Sequence[Batch]) -> None:
        self.engine, self.batches = engine, batches
        self.clock = Clock(engine.device)
        self.done = 0
        self._started: Any = None  # the step whose numbers have not been read

    def next_batch(self) -> Batch:
        return self.batches[self.done % len(self.batches)]

    def step(self) -> None:
        batch = self.next_batch()
        started = self.engine.start_step(batch, step=self.done, progress=PROGRESS, lr=LR)
        self.done += 1
        before, self._started = self._started, started
        if before is not None:
            self._read(before)

    def settle(self) -> None:
        """Wait for all that was started."""
        self.clock.settle()
        if self._started is not None:
            self._read(self._started)
        self._started = None

    def _read(self, started: Any) -> None:
        result = started.result()
        if result.is_skipped:
            raise RuntimeError(f"a step was skipped: {result.bad_terms() or 'a gradient'}")

    def times_ms(self, *, warmup: int, least: int, budget_s: float) -> list[float]:
        """Milliseconds of each step: at least `least`, and until the budget is spent."""
        for _ in range(warmup):
            self.step()
        self.settle()
        points = [self.clock.now()]
        start = time.perf_counter()
        while len(points) <= least or (
            time.perf_counter() - start < budget_s and len(points) <= 100
        ):
            self.step()
            points.append(self.clock.now())
        self.settle()
        return [self.clock.ms(a, b) for a, b in zip(points, points[1:], strict=False)]

    def parts_ms(self, steps: int) -> dict[str, float]:
        """Mean milliseconds of each of PARTS; they add up to the step."""
        totals = dict.fromkeys(PARTS, 0.0)
        marks = []
        with _Spans(self.engine, self.clock) as spans:
            for _ in range(1 + steps):
                begin = self.clock.now()
                self.step()
                marks.append((begin, self.clock.now(), spans.taken()))
            self.settle()
            # not the first: before it the GPU had nothing to do
            for begin, end, of_step in marks[1:]:
                for name, spent in spans.parts(begin, end, of_step).items():
                    totals[name] += spent / steps
        return totals


class _Spans:
    """Marks around the parts of a step, taken off again at the end."""

    def __init__(self, engine: Any, clock: Clock) -> None:
        self.engine, self.clock = engine, clock
        self._spans: list[tuple[str, Any, Any]] = []
        self._undo = contextlib.ExitStack()
        self._in_backward = False

    def taken(self) -> list[tuple[str, Any, Any]]:
        """The marks since it was last asked."""
        taken, self._spans = self._spans, []
        return taken

    def __enter__(self) -> _Spans:
        for name in ("_keep_buffers", "_forward", "_backward", "_update"):
            self._undo.enter_context(self._method(name))
        for name in ("vision", "text"):
            self._watch(name, getattr(self.engine.objective.model, name))
        return self

    def __exit__(self, *_: Any) -> None:
        self._undo.close()

    @contextlib.contextmanager
    def _method(self, name: str) -> Iterator[None]:
        inner: Callable[..., Any] = getattr(self.engine, name)

        def timed(*args: Any, **named: Any) -> Any:
            self._in_backward = name == "_backward"
            begin = self.clock.now()
            made = inner(*args, **named)
            self._spans.append((name, begin, self.clock.now()))
            self._in_backward = False
            return made

        setattr(self.engine, name, timed)
        try:
            yield
        finally:
            delattr(self.engine, name)

    def _watch(self, name: str, module: torch.nn.Module) -> None:
        begins: list[Any] = []

        def before(*_: Any) -> None:
            begins.append(self.clock.now())

        def after(*_: Any) -> None:
            label = "again" if self._in_backward else name
            self._spans.append((label, begins.pop(), self.clock.now()))

        for handle in (
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after),
        ):
            self._undo.callback(handle.remove)

    def parts(self, begin: Any, end: Any, of_step: list[tuple[str, Any, Any]]) -> dict[str, float]:
        """What the marks of one step say, once the device has come to them."""

        def spent(name: str) -> float:
            return sum(self.clock.ms(a, b) for label, a, b in of_step if label == name)

        to_device = next(a for label, a, _ in of_step if label == "_keep_buffers")
        vision, text, again = spent("vision"), spent("text"), spent("again")
        made = {
            "data": self.clock.ms(begin, to_device),
            "vision forward": vision,
            "text forward": text,
            "heads and losses forward": spent("_forward") - vision - text,
            "backward": spent("_backward") - again,
            "towers again": again,
            "optimiser": spent("_update"),
        }
        return made | {"between": self.clock.ms(begin, end) - sum(made.values())}


def profile(runner: Runner, steps: int = 3, most: int = 15) -> dict[str, Any]:
    """The operations or kernels that take most of the device's time, a step's worth each, and the
    time of all of them: what a step takes beyond it, the GPU stands idle."""
    from torch.profiler import ProfilerActivity

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    on_gpu = runner.clock.is_gpu
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    runner.step()
    runner.settle()
    with torch.profiler.profile(activities=activities) as made:
        for _ in range(steps):
            runner.step()
        runner.settle()

    def spent_us(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    # a GPU's kernels and copies are events of their own; the operators that launched them are not
    # asked for their time a second time
    events = [e for e in made.key_averages() if not on_gpu or _is_on_device(e)]
    whole = sum(spent_us(event) for event in events)
    events.sort(key=spent_us, reverse=True)
    lines = [
        {
            "kernel": event.key[:120],
            "calls": event.count / steps,
            "ms": spent_us(event) / steps / 1e3,
            "share": spent_us(event) / max(whole, 1e-9),
        }
        for event in events[:most]
    ]
    return {"profile": lines, "device_ms": whole / steps / 1e3}


def _is_on_device(event: Any) -> bool:
    return "CUDA" in str(event.device_type)

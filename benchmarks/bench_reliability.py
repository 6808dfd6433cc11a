"""Reliability: run the fault matrix, keep each test's outcome and figures, print the scoreboard.

    python benchmarks/bench_reliability.py --run     # all of it, at most 60 minutes on 2 cores
    python benchmarks/bench_reliability.py --run -k "kill or hung"
    python benchmarks/bench_reliability.py --run --missing    # go on after an interruption
    python benchmarks/bench_reliability.py           # the scoreboard of what is on disk

Outcomes are in benchmarks/results/reliability.json, one entry a test, with commit and date; a test
that was not run stays as it was, and is marked where the commit is another. A run puts its
scoreboard into docs/reliability.md too, unless --out keeps its outcomes elsewhere. The scoreboard
is made from that file alone: a row without an outcome says "not run", a row of which any test
failed says "FAILED". A fault that did not fire fails its own test, so the rows count tests that
passed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import pytest

from benchmarks.harness import RESULTS, ROOT, environment, replace_between

OUT = RESULTS / "reliability.json"
PAGE, MARK = ROOT / "docs" / "reliability.md", "scoreboard"
PATHS = (
    "tests/faults",
    "tests/training",
    "tests/losses/test_ranks.py",
    "tests/encoders/test_normalisation.py",
    "tests/dataloading/test_worker_pool.py",
    "tests/dataloading/test_loader.py",
    "tests/dataloading/test_loader_batch.py",
    "tests/dataloading/test_ledger.py",
    "tests/dataloading/test_manifest.py",
    "tests/dataloading/test_image_file.py",
    "tests/dataloading/test_dicom_errors.py",
    "tests/dataloading/test_fuzz_images.py",
    "tests/dataloading/test_phi_run.py",
    "tests/kernels/test_token_knowledge_patch_reference.py",
    "tests/kernels/test_token_knowledge_patch_float32.py",
)
Outcome = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A line of the scoreboard: what, its goal, whose tests, and how their figures make one."""

    figure: str
    goal: str
    tests: tuple[str, ...]  # beginnings of test ids, or parts of them
    reached: Callable[[list[Outcome]], str]


def _values(outcomes: Sequence[Outcome], key: str) -> list[float]:
    return [o["figures"][key] for o in outcomes if key in o["figures"]]


def passed(outcomes: Sequence[Outcome]) -> str:
    return f"{sum(o['outcome'] == 'passed' for o in outcomes)} of {len(outcomes)}"


def _most(key: str, text: str) -> Callable[[list[Outcome]], str]:
    def reached(outcomes: list[Outcome]) -> str:
        values = _values(outcomes, key)
        worst = f"; {text.format(max(values))}" if values else ""
        return f"{passed(outcomes)}{worst}"

    return reached


def _sum(key: str, text: str) -> Callable[[list[Outcome]], str]:
    def reached(outcomes: list[Outcome]) -> str:
        return text.format(int(sum(_values(outcomes, key))))

    return reached


P, S = "tests/faults/test_process.py::", "tests/faults/test_storage.py::"
T, D = "tests/training/", "tests/dataloading/"
ROWS = (
    Row(
        "one loss and gradient: ranks x passes x ZeRO stages",
        "loss 1e-6, gradients 1e-5",
        (f"{T}test_exact.py::test_the_whole_matrix",),
        lambda o: (
            f"{int(sum(_values(o, 'cases')))} cases, {passed(o)} worlds; loss "
            f"{max(_values(o, 'loss_error'), default=float('nan')):.1e}, gradients "
            f"{max(_values(o, 'gradient_error'), default=float('nan')):.1e}"
        ),
    ),
    Row("the same, small form on two ranks", "as above", (f"{T}test_exact.py::",), passed),
    Row(
        "F01 kill -9 of each rank at each phase x 3 seeds",
        "60 of 60, at most 1 interval (4 steps)",
        (f"{P}test_kill_of_each_rank",),
        _most("steps_lost", "at most {:.0f} steps lost"),
    ),
    Row(
        "F01 a peer is missed after",
        "5 s",
        (f"{P}test_kill_of_each_rank",),
        _most("notice_s", "at most {:.2f} s"),
    ),
    Row(
        "every step and tensor after the resume",
        "20 of 20 kills, the same bits",
        (f"{P}test_kill_of_each_rank",),
        passed,
    ),
    Row(
        "F02 hang found, rank and collective named",
        "timeout + 10 %",
        (f"{P}test_a_hung_rank",),
        _most("over_timeout", "at most {:+.0%}"),
    ),
    Row(
        "F03 kills inside a save",
        "0 of 100 unreadable",
        (f"{S}test_a_hundred_kills",),
        lambda o: (
            f"{int(sum(_values(o, 'unreadable')))} unreadable of {int(sum(_values(o, 'kills')))} "
            f"({int(sum(_values(o, 'inside_a_save')))} inside a save)"
        ),
    ),
    Row(
        "F04 disk full: the previous stays, the path is named",
        "all",
        (f"{T}test_checkpoint.py::test_a_full_disk", f"{T}test_checkpoint.py::test_a_write_that"),
        passed,
    ),
    Row("F05 truncations caught", "50 of 50", (f"{S}test_fifty",), _sum("caught", "{} of 50")),
    Row("F06 flipped bits caught", "100 of 100", (f"{S}test_a_hundred_flipped",),
        _sum("caught", "{} of 100")),
    Row("F07 planted pointers, markers, links", "all",
        (f"{S}test_a_pointer", f"{S}test_a_marker", f"{S}test_a_planted_link"), passed),
    Row(
        "F08 stops at random instants",
        "20 of 20, 0 steps lost",
        (f"{P}test_a_stop_at",),
        _most("steps_lost", "{:.0f} steps lost"),
    ),
    Row(
        "F09 any world to any, any stage to any",
        "bits at load, 1e-6 after, 144",
        ("tests/faults/test_elastic.py::test_every_world",),
        lambda o: (
            f"{int(sum(_values(o, 'transitions')))} transitions, {passed(o)}; loss "
            f"{max(_values(o, 'loss_error'), default=float('nan')):.1e}"
        ),
    ),
    Row(
        "F10 sample order after a resume",
        "100 points x 4 worker counts",
        ("tests/faults/test_order.py::",),
        _sum("points", "{} points, exact sequence"),
    ),
    Row("F11 worker killed, hung, StopIteration", "all",
        ("tests/dataloading/test_worker_pool.py::", "tests/dataloading/test_loader.py::test_stop",
         "tests/dataloading/test_loader.py::test_an_exception"), passed),
    Row("F12 two jobs, stale lock, read-only, clock", "all",
        (f"{P}test_two_jobs", f"{P}test_a_clock", f"{T}test_lifecycle.py::test_a_second_job",
         f"{T}test_lifecycle.py::test_the_lock", f"{T}test_lifecycle.py::test_a_folder",
         f"{T}test_lifecycle.py::test_a_file"), passed),
    Row("F13 other settings or content refused", "all",
        (f"{T}test_checkpoint.py::test_other_settings", f"{T}test_loop.py::test_other_content",
         "tests/dataloading/test_loader.py::test_a_state_of_another_order"), passed),
    Row("N01 NaN or inf on one rank", "all", (f"{P}test_bad_numbers",), passed),
    Row("N02 spike told apart", "all", (f"{P}test_a_spike", f"{T}test_spikes.py::test_the_cause"),
        passed),
    Row("N03 fp16 scale collapse", "fp16 is refused",
        (f"{T}test_deepspeed_json.py::test_a_json_that_contradicts",), passed),
    Row("pickle, YAML, code payloads executed", "0 of 12", (f"{T}test_malice.py::test_a_planted",),
        lambda o: f"{int(sum(_values(o, 'executed')))} of {len(o)}"),
    Row(
        "goodput, kill every 120 s for 10 min",
        "75 %",
        ("tests/faults/test_goodput.py::",),
        lambda o: "; ".join(
            f"{x['figures'].get('goodput', float('nan')):.0%} (every "
            f"{x['figures'].get('period', 0):.0f} s for {x['figures'].get('seconds', 0):.0f} s, "
            f"{x['figures'].get('kills', 0)} kills)"
            for x in o
        ),
    ),
    Row("bad inputs: 10,000 DICOM, 10,000 JPEG mutants", "0 crashes, hangs, leaked errors",
        (f"{D}test_fuzz_images.py::test_ten_thousand",), passed),
    Row("every sample accounted for", "all",
        (f"{D}test_ledger.py::", f"{D}test_loader.py::test_every_row"), passed),
    Row("paths that lead outside refused", "all", (
        f"{D}test_manifest.py::test_a_path", f"{D}test_manifest.py::test_a_nul",
        f"{D}test_manifest.py::test_a_folder_link", f"{D}test_image_file.py::test_a_link_out"),
        passed),
    Row("memory on bombs", "256 MiB above idle",
        (f"{D}test_dicom_errors.py::test_bombs", f"{D}test_image_file.py::test_a_declared_bomb"),
        passed),
    Row("planted identifiers in a run's files", "0 of 50", (f"{D}test_phi_run.py::test_fifty",),
        passed),
    Row("DICOM errors that name code and file", "all", (f"{D}test_dicom_errors.py::",), passed),
    Row("float32 reference against float64", "1e-5 at any scale",
        ("tests/kernels/test_token_knowledge_patch_float32.py::test_float32_stays",), passed),
    Row(
        "connections beyond this machine",
        "0",
        ("tests/faults/test_offline.py::test_the_launcher",),
        lambda o: (
            f"{int(sum(_values(o, 'attempts')))} tried by "
            f"{int(sum(_values(o, 'commands')))} commands"
        ),
    ),
    Row(
        "cost of determinism",
        "5 % on a CPU",
        ("tests/faults/test_determinism_cost.py::",),
        lambda o: f"{max(_values(o, 'cost'), default=float('nan')):.1%} of a step's processor time",
    ),
    Row("faults that fired", "all", (f"{P}",), _sum("fired", "{}")),
)  # fmt: skip


class Recorder:
    """A pytest plugin: each test's outcome, time and recorded properties, on disk as it ends.

    Merged into the file under a lock, so that an interrupted run loses nothing and parts may run
    beside one another. `missing` leaves out the tests that have passed or were skipped before.
    """

    def __init__(self, path: Path, *, missing: bool = False) -> None:
        self.path = path
        self.missing = missing
        self.facts = environment("cpu")
        self.begin = (time.monotonic(), processor_seconds())
        self.ended: dict[str, Outcome] = {}

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        if not self.missing:
            return
        done = {name for name, o in read(self.path).items() if o["outcome"] != "failed"}
        left_out = [item for item in items if item.nodeid in done]
        items[:] = [item for item in items if item.nodeid not in done]
        config.hook.pytest_deselected(items=left_out)

    def pytest_runtest_logstart(self) -> None:
        self.begin = (time.monotonic(), processor_seconds())

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        self.ended[report.nodeid] = {
            "outcome": report.outcome,
            "figures": dict(report.user_properties),
            "commit": self.facts["commit"],
            "modified": self.facts["modified"],
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }

    def pytest_runtest_logfinish(self) -> None:
        # not before: until its end a test may have put its own os.open, clock or processes in place
        wall, processor = self.begin
        spent = {
            "seconds": round(time.monotonic() - wall, 2),
            "processor_seconds": round(processor_seconds() - processor, 2),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(self.path.parent):
            ended = {name: {**outcome, **spent} for name, outcome in self.ended.items()}
            held = {**read(self.path), **ended}
            self.ended.clear()
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n")
            partial.replace(self.path)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # which ends the lock


def processor_seconds() -> float:
    """Of this process and all it started, ended ones included; nothing else on the machine."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            t = process.cpu_times()
            total += t.user + t.system + t.children_user + t.children_system
    return total


def read(path: Path = OUT) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def scoreboard(held: Mapping[str, Outcome]) -> list[tuple[str, str, str]]:
    """(figure, goal, reached) of every row."""
    lines = []
    for row in ROWS:
        found = [o for name, o in held.items() if any(name.startswith(t) for t in row.tests)]
        ran = [o for o in found if o["outcome"] != "skipped"]
        if not ran:
            lines.append((row.figure, row.goal, "not run"))
            continue
        failed = [o for o in ran if o["outcome"] != "passed"]
        reached = f"FAILED {len(failed)} of {len(ran)}" if failed else row.reached(ran)
        lines.append((row.figure, row.goal, reached))
    lines.append(("the same under NCCL on several GPUs", "as above", "not run (no GPUs)"))
    return lines


def show(held: Mapping[str, Outcome]) -> str:
    lines = scoreboard(held)
    widths = [max(len(line[i]) for line in lines) for i in range(2)]
    text = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in lines]
    commits = sorted({str(o.get("commit")) for o in held.values()})
    if held:
        wall, processor = (
            sum(o.get(key, 0.0) for o in held.values()) / 60
            for key in ("seconds", "processor_seconds")
        )
        text.append(
            f"{len(held)} tests, {wall:.1f} min of their own time one after another, "
            f"{processor:.1f} min of processor time, commit {', '.join(commits)}"
        )
    return "\n".join(text)


def as_block(held: Mapping[str, Outcome]) -> str:
    """The scoreboard as the page shows it."""
    return f"```text\n{show(held)}\n```"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--run", action="store_true", help="run the tests first")
    parser.add_argument(
        "--missing", action="store_true", help="leave out what has passed before, of any commit"
    )
    parser.add_argument("-k", default="", help="only tests that match, as pytest's -k")
    parser.add_argument("--out", type=Path, default=OUT, help="where outcomes are kept")
    options = parser.parse_args(arguments)
    code = 0
    if options.run:
        begin = time.monotonic()
        wanted = ["-m", "not gpu", "--tb=short", *(["-k", options.k] if options.k else [])]
        # while outcomes come in, the page is behind them
        wanted += ["--deselect", "tests/training/test_scoreboard.py::test_the_page"]
        code = int(
            pytest.main(
                [*wanted, *(str(ROOT / path) for path in PATHS)],
                plugins=[Recorder(options.out, missing=options.missing)],
            )
        )
        print(f"{(time.monotonic() - begin) / 60:.1f} minutes")
    print(show(read(options.out)))
    if options.run and options.out == OUT:
        page = replace_between(PAGE.read_text(encoding="utf-8"), MARK, as_block(read(options.out)))
        PAGE.write_text(page, encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())

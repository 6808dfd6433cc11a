"""`make gpu-check` needs torch, triton, numpy and pytest alone, and says where a GPU is missing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, harness
from tests.conftest import pytest_runtest_setup

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]

# everything that those four import by themselves is there; nothing else is
BARE = """
import importlib, pathlib, runpy, sys
import numpy, pytest, torch, torch.distributed, torch.profiler, triton, triton.language

class Bare:
    ours = {"mlip", "tests", "benchmarks"}
    present = set(sys.modules) | set(sys.stdlib_module_names) | ours

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in self.present:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Bare())
for path in sorted(pathlib.Path("tests/kernels").glob("*.py")):
    if path.stem != "launch_offline":  # a script that takes the driver away
        importlib.import_module(f"tests.kernels.{path.stem}")
import tests.conftest, benchmarks.bench_kernels
from benchmarks import gpu_check
sys.argv = ["gpu_check.py"]
sys.exit(gpu_check.main())
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the whole GPU check")
def test_it_starts_with_nothing_else_installed_and_names_the_missing_gpu() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-P", "-c", BARE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2, run.stderr[-3000:]
    assert "gpu-check needs an NVIDIA GPU" in run.stderr and "make test" in run.stderr


@pytest.mark.parametrize("name", gpu_check.PARTS)
def test_every_part_has_gpu_tests_and_ends_within_nine_minutes(name: str) -> None:
    part = gpu_check.PARTS[name]
    for tests in (ROOT / path for path in part.tests):
        files = sorted(tests.glob("test_*.py")) if tests.is_dir() else [tests]
        assert any("mark.gpu" in file.read_text(encoding="utf-8") for file in files), tests
    assert part.benchmark is None or (ROOT / "benchmarks" / part.benchmark).is_file()
    assert part.tests_s <= gpu_check.TOTAL_S - gpu_check.RESERVE_S
    # as `make gpu-check` has always asked for
    assert part.needs[:4] == ("torch", "triton", "numpy", "pytest")
    assert (part.needs == gpu_check.BASE) == (name == "kernels")


def test_every_file_with_gpu_tests_belongs_to_a_part() -> None:
    """A GPU test that no part runs would wait for somebody to remember it."""
    mark = "mark." + "gpu"
    own = Path(__file__)
    marked = {p for p in (ROOT / "tests").rglob("test_*.py") if mark in p.read_text() and p != own}
    paths = [ROOT / path for part in gpu_check.PARTS.values() for path in part.tests]
    assert marked and all(any(p.is_relative_to(path) for path in paths) for p in marked)


@pytest.mark.parametrize("is_marked", [True, False])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_gpu_test_says_where_there_is_no_gpu(
    is_there: bool, is_marked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pytest -m gpu` without one: eighteen ended in the driver's error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    item: Any = SimpleNamespace(get_closest_marker=lambda _: object() if is_marked else None)
    with contextlib.ExitStack() as stack:
        if is_marked and not is_there:
            stack.enter_context(pytest.raises(pytest.skip.Exception, match="needs an NVIDIA GPU"))
        pytest_runtest_setup(item)


def test_after_red_tests_it_says_how_to_get_the_benchmark_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An hour of a card is short: one wrong bound must not cost the figures too."""
    ran: list[list[str]] = []
    paths: list[str] = []

    def run(command: list[str], env: dict[str, str], **_: object) -> Any:
        ran.append(command)
        paths.append(env["PYTHONPATH"])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "run_tests", lambda *_: 1)
    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    monkeypatch.setenv("PYTHONPATH", "/carried")
    monkeypatch.setenv("MLIP_COMMIT", "0123456789ab")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 1 and not ran
    assert "bench_kernels.py was not run; --skip-tests runs it alone" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--skip-tests"])
    assert gpu_check.main() == 0 and ran[0][1].endswith("bench_kernels.py")
    # packages that were carried to a machine without a network stay importable
    assert paths[0] == os.pathsep.join([str(ROOT), "/carried"])
    assert Path(ran[0][ran[0].index("--out") + 1]).parent == harness.RESULTS
    # where a limit may strike, rows are written to what comes back
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--skip-tests", "--out", "kept/rows.json"])
    assert gpu_check.main() == 0 and ran[1][2:4] == ["--out", "kept/rows.json"]


def test_a_benchmark_that_lost_the_gpu_goes_on_in_a_fresh_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the minutes that are left, as often as it happens; the check is red all the same."""
    codes, ran = [harness.LOST_GPU, harness.LOST_GPU, 0], []
    now = SimpleNamespace(s=0.0)

    def run(command: list[str], timeout: float, **_: object) -> Any:
        ran.append((command, timeout))
        now.s += 120.0
        return subprocess.CompletedProcess(command, codes[len(ran) - 1])

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now.s)
    assert gpu_check.run_benchmark(["python", "b.py"], {}, 600.0) == harness.LOST_GPU
    assert [command for command, _ in ran] == [
        ["python", "b.py", "--minutes", "9.00"],
        ["python", "b.py", "--go-on", "--minutes", "7.00"],
        ["python", "b.py", "--go-on", "--minutes", "5.00"],
    ]
    assert [timeout for _, timeout in ran] == [600.0, 480.0, 360.0]


def test_figures_of_no_commit_are_refused_before_any_minute_is_spent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "run_tests", lambda *_: pytest.fail("tests were run"))
    monkeypatch.setattr(harness, "_run", lambda *_: None)  # no git
    monkeypatch.delenv("MLIP_COMMIT", raising=False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    assert "set MLIP_COMMIT" in capsys.readouterr().err
    monkeypatch.setenv("MLIP_COMMIT", "0123456789ab")
    monkeypatch.setattr(gpu_check, "run_tests", lambda *_: 1)
    assert gpu_check.main() == 1


def test_a_package_inside_a_missing_one_is_missing() -> None:
    assert gpu_check.is_there("json.decoder") and not gpu_check.is_there("no_such.inner")


def _benchmark_of(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What main starts behind green tests that took 100 s, on a machine that has everything."""
    told: dict[str, Any] = {}
    now = SimpleNamespace(s=1000.0)

    def run_tests(part: Any, environment: dict[str, str], seconds: float) -> int:
        told["tests"] = (part, environment, seconds)
        now.s += 100.0
        return 0

    def run(command: list[str], **more: Any) -> Any:
        told.update(more, command=command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "is_there", lambda name: True)
    monkeypatch.setattr(gpu_check, "run_tests", run_tests)
    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now.s)
    monkeypatch.setenv("MLIP_COMMIT", "0123456789ab")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    # the benchmark's failure is that of the check
    assert gpu_check.main() == (3 if "command" in told else 0)
    return told


@pytest.mark.parametrize("name", gpu_check.PARTS)
def test_a_benchmark_gets_its_part_s_options_and_the_minutes_that_tests_left(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: nine minutes, 20 s of them for writing, 100 s for the tests, one for a late row."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MLIP_DISABLE_TRITON", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    told = _benchmark_of(["--part", name], monkeypatch)
    wanted = {"data": ["--only", "reading"], "deepspeed": ["--only", "deepspeed"]}.get(name, [])
    script = "bench_kernels.py" if name == "kernels" else "bench_step.py"
    assert told["command"] == [
        sys.executable, str(ROOT / "benchmarks" / script), *wanted,
        "--out", told["command"][-3], "--minutes", "6.00",
    ]  # fmt: skip
    kind = "kernels" if name == "kernels" else "step"  # of which --report reads the rows
    assert Path(told["command"][-3]).match(f"benchmarks/results/{kind}-*.json")
    assert told["timeout"] == pytest.approx(540 - 20 - 100) and told["cwd"] == ROOT
    part, environment, seconds = told["tests"]
    assert part is gpu_check.PARTS[name] and seconds == part.tests_s
    assert environment == told["env"] and environment["PYTHONPATH"].startswith(str(ROOT))
    # neither the interpreter's kernels, nor plain torch, nor a CPU are what a card is asked about
    switches = {"TRITON_INTERPRET", "MLIP_DISABLE_TRITON", "DS_ACCELERATOR"}
    assert switches.isdisjoint(environment)


def test_tests_alone_and_benchmarks_alone_are_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLIP_COMMIT", raising=False)
    assert set(_benchmark_of(["--skip-benchmarks"], monkeypatch)) == {"tests"}
    told = _benchmark_of(["--skip-tests"], monkeypatch)
    assert "tests" not in told and told["command"][-1] == "7.67"


def test_what_the_machine_lacks_ends_it_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlip.kernels import _dispatch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "run_tests", lambda *_: pytest.fail("tests were run"))
    monkeypatch.setattr(gpu_check, "is_there", lambda name: name != "pydicom")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--part", "deepspeed"])
    assert gpu_check.main() == 2 and "gpu-check needs pydicom in" in capsys.readouterr().err
    monkeypatch.setattr(_dispatch, "missing_tools", lambda: "no C compiler")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2 and "no C compiler" in capsys.readouterr().err


SHARED_TESTS = """
import os, pathlib, time, pytest

@pytest.mark.gpu
def test_of_a_gpu():
    with open(os.environ["TOLD"], "a") as file:
        file.write(os.environ["MLIP_TEST_SHARE"] + " ")
    kind = os.environ["KIND"]
    if kind == "hangs":
        time.sleep(60)
    assert kind != "fails" or not os.environ["MLIP_TEST_SHARE"].startswith("0/"), "the reason"

def test_of_a_cpu():
    raise AssertionError("run")
"""


@pytest.mark.parametrize(
    ("kind", "is_shared", "outcome"),
    [("passes", True, 0), ("passes", False, 0), ("fails", True, 1), ("hangs", False, 1)],
)
def test_gpu_tests_alone_run_in_all_shares_and_one_that_fails_or_hangs_is_red(
    kind: str,
    is_shared: bool,
    outcome: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first share's failure is not hidden by the second's success."""
    file, told = tmp_path / "test_shared.py", tmp_path / "told.txt"
    file.write_text(SHARED_TESTS, encoding="utf-8")
    monkeypatch.setattr(gpu_check.os, "cpu_count", lambda: 4)  # two are left to others
    part = gpu_check.Part((str(file),), (), is_shared=is_shared)
    environment = {**os.environ, "KIND": kind, "TOLD": str(told)}
    seconds = 3.0 if kind == "hangs" else 100.0
    assert gpu_check.run_tests(part, environment, seconds) == outcome
    said = capsys.readouterr()
    assert ("the reason" in said.out) == (kind == "fails")
    assert ("did not end within 3 s" in said.err) == (kind == "hangs")
    if kind != "hangs":
        shares = ["0/2", "1/2"] if is_shared else ["0/1"]
        assert sorted(told.read_text(encoding="utf-8").split()) == shares

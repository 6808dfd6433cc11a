"""Process 1 of a container, as a plain process: signals, exit codes, what a command leaves behind.

What a whole training does in a container: docs/container.md.
"""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIRST = [sys.executable, "-m", "mlip.first_process"]
# a launcher that dies of SIGTERM, with a rank that notes that it is gone, saves and ends with 75,
# after a process that the rank has left has ended with 1
LAUNCHER = """
import os, subprocess, sys, time
rank = '''
import os, subprocess, sys, time
print("ready", flush=True)
first = os.getppid()
while os.getppid() == first:
    time.sleep(0.02)
subprocess.run(["sh", "-c", "(sleep 0.1; exit 1) &"])
time.sleep(0.6)
open(sys.argv[1], "w").write("saved")
sys.exit(75)
'''
subprocess.Popen([sys.executable, "-c", rank, sys.argv[1]])
time.sleep(60)
"""
# as train.py under torchrun or alone: it handles the signal itself
HANDLER = """
import signal, sys, time
caught = []
def stop(number, frame):
    caught.append(number)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, stop)
print("ready", flush=True)
while not caught:
    time.sleep(0.02)
time.sleep(0.3)
print([signal.Signals(number).name for number in caught], flush=True)
sys.exit(75)
"""
# what train.py does of it
RANK = """
import os, sys, time
from mlip.training.stop_request import StopRequest
stop = StopRequest()
print("ready", flush=True)
while not stop.is_set:
    time.sleep(0.05)
time.sleep(1)
open(os.path.join(sys.argv[-1], "saved" + os.environ["RANK"]), "w").close()
sys.exit(75)
"""


def _start(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [*FIRST, sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True, **options
    )


def _said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_what_a_launcher_leaves_may_save_and_its_exit_code_counts(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    process = _start(LAUNCHER, str(tmp_path / "state"))
    started.append(process)
    assert _said(process) == "ready"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert (tmp_path / "state").read_text() == "saved"


def test_the_deepspeed_command_may_die_while_its_ranks_save(
    tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    """The real one, which does not pass SIGTERM on."""
    script = tmp_path / "rank.py"
    script.write_text(RANK, encoding="utf-8")
    command = [*FIRST, str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    process = subprocess.Popen(
        [*command, "--log_level", "error", str(script), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    started.append(process)
    ready = 0
    while ready < 2:
        line = _said(process)
        assert process.poll() is None
        ready += line.count("ready")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert sorted(path.name for path in tmp_path.glob("saved*")) == ["saved0", "saved1"]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"])
def test_a_signal_reaches_the_command_once_and_its_own_exit_code_counts(
    number: str, started: list[subprocess.Popen[str]]
) -> None:
    process = _start(HANDLER)
    started.append(process)
    assert _said(process) == "ready"
    process.send_signal(getattr(signal, number))
    assert _said(process) == f"['{number}']"
    assert process.wait(20) == 75


def test_a_terminals_ctrl_c_is_not_handed_on(started: list[subprocess.Popen[str]]) -> None:
    """The terminal sends it to its group, command included; a second ends a run without a save.

    Here the command has left that group, so that all it gets was handed on.
    """
    ours, its = pty.openpty()
    process = _start(
        f"import os; os.setpgid(0, 0)\n{HANDLER}",
        stdin=its,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # the terminal of its session
    )
    started.append(process)
    assert _said(process) == "ready"
    os.write(ours, b"\x03")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert _said(process) == "['SIGTERM']"
    assert process.wait(20) == 75
    os.close(ours)
    os.close(its)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 6"], 6),
        (["sh", "-c", "kill -KILL $$"], 137),
        ([""], 2),
        (["no-such-command"], 127),
        (["/"], 126),
        ([], 2),
        # ended, it is over, as any container: nobody waits for what goes on by itself
        (["sh", "-c", "sleep 40 2>&- & exit 3"], 3),
    ],
    ids=str,
)
def test_exit_codes_are_those_of_a_shell(command: list[str], code: int) -> None:
    began = time.monotonic()
    done = subprocess.run([*FIRST, *command], cwd=ROOT, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == code
    assert (b"mlip: " in done.stderr) == (code in (2, 126, 127))
    assert time.monotonic() - began < 30


def test_the_end_is_noticed_where_the_caller_ignores_that_of_its_children() -> None:
    """What a process ignores the next program ignores too, and then nobody is told of an end."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *FIRST, "sh", "-c", "exit 6"]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 6


def test_orphans_are_collected_while_the_command_works() -> None:
    """Process 1 alone can: uncollected, they fill the container's pids.max."""
    code = (
        "import os, subprocess, sys, time\n"
        "subprocess.run(['sh', '-c', 'for i in $(seq 40); do sleep 0.5 & done'])\n"
        "time.sleep(1.5)\n"
        "import psutil\n"
        "print([p.status() for p in psutil.Process(os.getppid()).children()])"
    )
    done = subprocess.run(
        [*FIRST, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() in ("['running']", "['sleeping']"), done.stderr


def test_a_pipe_that_nobody_reads_ends_the_writer_as_it_does_in_a_shell() -> None:
    command = [*FIRST, "sh", "-c", "yes | head -n 1 > /dev/null"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0 and done.stderr == b""  # ignored, yes complains


def test_it_imports_nothing_before_the_command_is_started() -> None:
    code = (
        "import sys, mlip.first_process\n"
        "print([m for m in ('torch', 'numpy', 'psutil', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr

"""Commands that are asked to end in the middle of a file: nothing half-written, one line, the code
that shells give; twice at once, and where the signal is ignored.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mlip.system.stop_signal import Stopped, signals_stop

ROOT = Path(__file__).resolve().parents[2]
# a command that sends itself signals while it writes, and once more on its way out
COMMAND = """
import os, signal, sys
from mlip import cli
from mlip.commands import arguments as command_arguments
from mlip.system.output_file import whole_file
from pathlib import Path
number, times, ignored = (int(given) for given in sys.argv[2:])
if ignored:
    signal.signal(number, signal.SIG_IGN)
def run_doctor(options):
    with whole_file(Path(sys.argv[1], "half")) as partial:
        partial.write_text("half")
        try:
            os.kill(os.getpid(), number)
            partial.write_text("whole")
        finally:
            print("on the way out", flush=True)
            if times == 2:
                os.kill(os.getpid(), number)
    return 0
command_arguments.run_doctor = run_doctor
sys.exit(cli.main(["doctor"]))
"""


def _run(folder: Path, number: int, times: int = 1, *, ignored: bool = False) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-c", COMMAND, str(folder), *map(str, (number, times, int(ignored)))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        # tests that a shell started in the background inherit an ignored SIGINT
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert "on the way out" in ended.stdout
    return ended.returncode, ended.stderr


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGINT, "mlip: interrupted\n"),
        (signal.SIGTERM, "mlip: ended by SIGTERM\n"),
        (signal.SIGHUP, "mlip: ended by SIGHUP\n"),
    ],
)
def test_a_command_that_is_asked_to_end_leaves_no_half_file(
    number: int, said: str, tmp_path: Path
) -> None:
    assert _run(tmp_path, number) == (128 + number, said)
    assert list(tmp_path.iterdir()) == []
    assert _run(tmp_path, number, ignored=True) == (0, "")  # as under nohup
    assert [path.read_text() for path in tmp_path.iterdir()] == ["whole"]


def test_a_second_signal_ends_the_command_there_without_a_traceback(tmp_path: Path) -> None:
    assert _run(tmp_path, signal.SIGINT, times=2) == (-signal.SIGINT, "")


def test_what_the_process_did_at_a_signal_is_what_it_does_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with signals_stop():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(Stopped), signals_stop():
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def turns() -> list[int]:
    """What a run that a fixture makes for a whole file leaves behind."""
    signal.signal(signal.SIGUSR1, lambda *_: None)
    logging.getLogger("mlip").propagate = False
    torch.set_num_threads(2)
    return []


@pytest.mark.parametrize("turn", [1, 2])
def test_what_a_fixture_of_a_file_leaves_behind_is_gone_at_the_next_test(
    turn: int, turns: list[int]
) -> None:
    turns.append(turn)
    left = (signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL, torch.get_num_threads() == 2)
    is_first = len(turns) == 1
    assert (*left, not logging.getLogger("mlip").propagate) == (is_first, is_first, is_first)

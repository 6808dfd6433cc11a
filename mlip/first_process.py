"""The first process of a container: starts a command, hands signals on, outlives what it leaves.

    python -P -m mlip.first_process deepspeed --num_gpus 2 train.py --config configs/demo.yaml

A container is over, and all in it killed, when its first process ends. The `deepspeed` command dies
of SIGTERM and leaves ranks that want to save (training/stop_request.py); as first process itself it
would not even notice the signal, as nothing there does that has no handler. Here SIGTERM ends the
command, the ranks save, and the exit code is theirs. What nobody waits for is collected.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_PASSED_ON = {
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2),
}
# a terminal sends these to its whole foreground group: twice would be a second Ctrl-C
_OF_A_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
_NOT_EXECUTABLE, _NOT_FOUND = 126, 127  # as shells report it


def main(command: Sequence[str]) -> int:
    """Run `command` to its end; its exit code, 128 + n where signal n ended it.

    Where a signal that came here too ended it, the end of the processes that it left is waited for,
    and the first of their exit codes that is not 0 counts.
    """
    if not command or not command[0]:  # "$COMMAND" where COMMAND is not set
        print("mlip: expected a command, such as: mlip doctor", file=sys.stderr)
        return 2
    watched = _PASSED_ON | {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    # ignored, as some callers leave it, no end of a process would ever be told
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # orphans come here also where this is not process 1 (apptainer, a host that shares its ids)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        child = os.posix_spawnp(
            command[0],
            list(command),
            os.environ,
            setsigmask=before,
            setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),  # which Python ignores
        )
    except OSError as error:
        print(f"mlip: {command[0]}: {error.strerror}", file=sys.stderr)
        return _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE
    asked, below = set(), set()
    while True:
        told = signal.sigwaitinfo(watched)
        if told.si_signo != signal.SIGCHLD:
            asked.add(told.si_signo)
            below |= _children_of(child)
            is_of_the_kernel = told.si_code > 0  # linux: SI_USER is 0, SI_KERNEL 128
            if not (told.si_signo in _OF_A_TERMINAL and is_of_the_kernel):
                os.kill(child, told.si_signo)  # not collected yet, so the number is still its own
            continue
        while (ended := os.waitpid(-1, os.WNOHANG))[0] not in (0, child):
            pass
        if ended[0] == child:
            code = os.waitstatus_to_exitcode(ended[1])
            if -code in asked:
                return _end_of_the_left(below) or 128 - code
            return code if code >= 0 else 128 - code


def _end_of_the_left(below: set[int]) -> int:
    """Waits for all that is still there; the first exit code of those `below` that is not 0, else 0

    Of the command's own children alone: the workers of ranks end as it comes, and first.
    """
    first = 0
    while True:
        try:
            process, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return first
        code = os.waitstatus_to_exitcode(status)
        if process in below and first == 0:
            first = code if code >= 0 else 128 - code


def _children_of(process: int) -> set[int]:
    import psutil  # 0.1 s that only a stop takes

    try:
        return {child.pid for child in psutil.Process(process).children()}
    except psutil.Error:  # a terminal's Ctrl-C has ended it already
        return set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

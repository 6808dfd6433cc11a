"""What a run of a million steps must not do: read all of its log, copy what never changes."""

import os
import tracemalloc
from pathlib import Path

import pytest

from mlip.training.line_file import LineFile, open_for_lines


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, ""),
        ("", ""),
        ('{"step": 1}\n', '{"step": 1}\n'),
        ('{"step": 1}\n{"st', '{"step": 1}\n{"st\n'),
    ],
)
def test_a_line_that_a_kill_cut_off_is_ended(
    tmp_path: Path, before: str | None, after: str
) -> None:
    path = tmp_path / "log.jsonl"
    if before is not None:
        path.write_text(before)
    lines = LineFile(path)
    lines.write('{"step": 2}')
    lines.close()
    assert path.read_text() == after + '{"step": 2}\n'


def test_the_log_so_far_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n' * 100_000)
    tracemalloc.start()
    os.close(open_for_lines(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2e5  # the file is 1.2e6

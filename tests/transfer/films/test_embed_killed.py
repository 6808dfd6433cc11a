"""`mlip embed` killed in the middle of a part goes on to the files of a run that was left alone."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlip.cli import main
from mlip.transfer.films.embed import write_embeddings
from tests.small_run import small_export, small_run

ROOT = Path(__file__).resolve().parents[3]
PART_ROWS = 12
# writes half of the second part, then dies as a process does that the system kills
KILLED = f"""
import os, signal, sys
from pathlib import Path
from mlip.cli import main
from mlip.transfer.films import embed
embed.write_embeddings.__kwdefaults__["part_rows"] = {PART_ROWS}
replace, done = Path.replace, []
def kill(self, target):
    if Path(target).name.startswith("part-"):
        done.append(target)
    if len(done) == 2:
        content = self.read_bytes()
        self.write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, target)
Path.replace = kill
main(sys.argv[1:])
"""


@pytest.mark.long
@pytest.mark.parametrize("form", ["safetensors", "parquet"])
def test_a_killed_run_goes_on_and_ends_with_the_files_of_one_left_alone(
    form: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    defaults = {**write_embeddings.__kwdefaults__, "part_rows": PART_ROWS}
    monkeypatch.setattr(write_embeddings, "__kwdefaults__", defaults)
    command = ["embed", *small_run().settings, f"checkpoint={small_export()}", "--patches"]
    command += ["--format", form, "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, *command, str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    # the lock of who was killed is free, and gone at the end of the next run
    left = sorted(p.name for p in out.iterdir() if p.name not in ("index.json", ".lock"))
    assert left[-1] == f"part-00000.{form}" and left[0].startswith(f".part-00001.{form}.")
    capsys.readouterr()
    assert main([*command, str(out)]) == 0
    said = capsys.readouterr().out
    assert "part 1 of 3" not in said and "part 2 of 3" in said and "32 of 32 rows in" in said
    whole, resumed = (
        {p.name: p.read_bytes() for p in folder.iterdir()} for folder in (tmp_path / "whole", out)
    )
    assert resumed == whole

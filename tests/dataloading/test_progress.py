"""Lines on stderr while much is looked at, none while little is."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import pytest

from mlip.dataloading import progress
from mlip.dataloading.prepare.command import add_arguments, run
from mlip.dataloading.prepare.phi_report import report_phi
from mlip.dataloading.progress import Progress


def test_a_line_comes_every_few_seconds_and_at_an_end_that_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    quiet, told = Progress("files"), Progress("images", tells_end=True)
    for second in range(1, 13):
        now[0] = float(second)
        quiet(10 * second)
        told(second, 12)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "files" in line] == ["50 files, 10/s", "100 files, 10/s"]
    assert [line for line in lines if "images" in line] == [
        "5 of 12 images, 1/s",
        "10 of 12 images, 1/s",
        "12 of 12 images, 1/s",
    ]


def test_what_takes_seconds_each_is_not_told_to_stand_still(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    told = Progress("groups")
    now[0] = 8.0
    told(2, 10)
    assert capsys.readouterr().err == "2 of 10 groups, 0.25/s\n"


def test_a_folder_that_is_long_looked_at_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(4):
        (tmp_path / "in" / f"p{i}").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "in" / f"p{i}" / "a.png"), np.full((40, 40), 99, np.uint8))
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["folder", "--root", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    assert run(parser.parse_args([*words, "--workers", "1"])) == 0
    told = capsys.readouterr().err
    for what in ("files found", "files looked at", "shards compared", "4 of 4 images"):
        assert what in told
    assert "p1" not in told and str(tmp_path) not in told
    (tmp_path / "in" / "a.dcm").write_bytes(bytes(128) + b"DICM")
    with pytest.raises(ValueError, match="no DICOM file could be checked"):
        report_phi(tmp_path / "in")
    assert "files checked" in capsys.readouterr().err

"""Mutated files never crash, hang or leak an unnamed exception; the harness sees it if they do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "fuzz_images.py"


def fuzz(*arguments: str) -> tuple[int, dict]:
    run = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    return run.returncode, json.loads(run.stdout)


def check(kind: str, count: int, seed: int) -> None:
    status, table = fuzz("--kind", kind, "--count", str(count), "--seed", str(seed))
    assert table["failures"] == [] and status == 0, table
    assert sum(table["codes"].values()) == count
    assert table["slowest_s"] <= 10 and table["peak_mib"] <= 1024
    # mutants must reach the decoders: some still decode, and to other pixels
    assert table["codes"]["changed_pixels"] > count / 50
    assert len(table["codes"]) >= (12 if kind == "dicom" else 5)


@pytest.mark.parametrize("kind", ["dicom", "jpeg"])
def test_a_thousand_mutants_end_in_pixels_or_in_a_code(kind):
    check(kind, 1000, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dicom", "jpeg"])
def test_ten_thousand_mutants_end_in_pixels_or_in_a_code(kind):
    check(kind, 10_000, seed=2)


def test_the_harness_sees_a_crash_a_hang_and_a_leaked_exception():
    status, table = fuzz(
        "--kind", "jpeg", "--count", "12", "--limit", "2", "--sabotage", "3:abort,5:hang,8:leak"
    )
    assert status == 1
    assert table["failures"] == [["crash", 3], ["hang", 5], ["crash", 8]]
    assert sum(table["codes"].values()) == 12

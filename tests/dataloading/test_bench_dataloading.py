"""The benchmark of the input path runs and holds what it claims, with room for a busy machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nvidia.dali", reason="nvidia.dali is not installed")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_dataloading.py"


@pytest.mark.long
def test_shards_through_dali_beat_files_through_a_dataloader():
    # processor seconds: what else the machine does costs all contestants alike
    command = [sys.executable, str(SCRIPT), "rate", "--rounds", "3", "--batches", "16"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in printed.splitlines()]
    place = lines[0].index("dali_is_x_cpu")
    ratio = {line[0]: float(line[place]) for line in lines[1:] if not line[0].endswith("_gpu")}
    # three runs on an Intel Xeon: 1.68 to 1.80, 2.41 to 2.67; on an AMD EPYC 1.77 and 3.26
    assert ratio["dataloader"] > 1.6 and ratio["dataloader_rgb"] > 2.2 and ratio["full"] > 60


@pytest.mark.long
def test_a_large_manifest_starts_in_seconds():
    command = [sys.executable, str(SCRIPT), "start"]
    row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert row["manifest_and_loader_cpu_s"] + row["first_plan_cpu_s"] < 10
    assert row["peak_mib"] < 1024

"""A table of tensors whose writing the system ends leaves no file under a name that nobody removes.

safetensors' save_file writes .tmpXXXXXX beside its target and renames it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# the system kills a process that writes a file larger than it may: in the middle of it
LIMITED = """
import resource, signal, sys
from pathlib import Path
import numpy as np, torch
out = Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
"""
WRITERS = {
    "reference": "from mlip.transfer.films.outliers import Reference, save_reference\n"
    "whitening = np.zeros((99, 99))\n"
    "save_reference(Reference(np.zeros(99), whitening, np.zeros(9), {}), out)",
    "vectors": "from mlip.knowledge.vectors import _save\n_save(torch.zeros(99, 99), out)",
    "part": "from mlip.transfer.films.embed import _write_part\n"
    "_write_part({'a': torch.zeros(9999)}, out)",
    "graph": "from mlip.knowledge.graph import write_vectors\n"
    "write_vectors({'a': torch.zeros(9999)}, out)",
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_killed_writer_leaves_what_the_next_one_removes(writer: str, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    program = [sys.executable, "-c", LIMITED + WRITERS[writer], str(out)]
    done = subprocess.run([*program, "limited"], cwd=ROOT, timeout=120)
    assert done.returncode < 0
    assert all(left.name.startswith(".out.safetensors.") for left in tmp_path.iterdir())
    # save_file's own, which takes its whole room first, is empty yet
    begun = (left for left in tmp_path.rglob("*") if left.is_file())
    assert any(left.stat().st_size or left.name.startswith(".tmp") for left in begun)
    assert subprocess.run(program, cwd=ROOT, timeout=120).returncode == 0
    assert list(tmp_path.iterdir()) == [out]

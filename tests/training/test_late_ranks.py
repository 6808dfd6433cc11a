"""Two ranks that read a step's numbers late agree on what was skipped and where to stop."""

from __future__ import annotations

from pathlib import Path

from mlip.training import checkpoint
from tests import rank_farm
from tests.training.late_ranks import run_both
from tests.training.test_loop import _events, _numbers


def test_two_ranks_that_read_late_skip_and_stop_together(tmp_path: Path) -> None:
    rank_farm.run(run_both, 2, str(tmp_path))
    late, now = _numbers(tmp_path / "late"), _numbers(tmp_path / "at-once")
    # the wish of the seventh step is read when the eighth is under way, which is saved
    assert len(now) == 12 and late == now[:8] and late[3][1] is None
    (event,) = _events(tmp_path / "late", "stopped")
    assert event["step"] == 8
    for name in ("late", "at-once"):
        (skipped,) = _events(tmp_path / name, "skipped")
        assert skipped["step"] == 4 and len(skipped["manifest_rows"]) == 8
    assert [c.name for c in checkpoint.checkpoints_of(tmp_path / "late")] == ["step_00000008"]

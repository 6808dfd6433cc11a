"""Two ranks that read a step's numbers late agree on what was skipped and where to stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlip.training import checkpoint
from tests import rank_farm
from tests.faults.jobs import events
from tests.training.late_ranks import run_all
from tests.training.test_loop import _numbers


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("late")
    rank_farm.run(run_all, 2, str(folder))
    return folder


def test_two_ranks_that_read_late_skip_and_stop_together(runs: Path) -> None:
    late, now = _numbers(runs / "stopped"), _numbers(runs / "at-once")
    # the wish of the seventh step is read when the eighth is under way, which is saved
    assert len(now) == 12 and late == now[:8] and late[3][1] is None
    (event,) = events(runs / "stopped", "stopped")
    assert event["step"] == 8
    for name in ("stopped", "at-once"):
        (skipped,) = events(runs / name, "skipped")
        assert skipped["step"] == 4 and len(skipped["manifest_rows"]) == 8
    assert [c.name for c in checkpoint.checkpoints_of(runs / "stopped")] == ["step_00000008"]


def test_after_an_error_each_rank_tells_its_own_rows_of_the_step_before(runs: Path) -> None:
    """No collective may be asked of ranks that are on their way out."""
    told = events(runs / "error", "skipped_here")
    assert sorted(event["rank"] for event in told) == [0, 1] and not events(
        runs / "error", "skipped"
    )
    assert {event["step"] for event in told} == {5}
    rows = sorted(row for event in told for row in event["manifest_rows"])
    assert rows == list(range(32, 40)) and all(len(e["manifest_rows"]) == 4 for e in told)
    assert len(_numbers(runs / "error")) == 5


def test_a_stop_of_one_rank_while_the_run_is_set_up_stops_both_before_a_step(runs: Path) -> None:
    (event,) = events(runs / "set-up", "stopped")
    assert event["step"] == 0 and not checkpoint.checkpoints_of(runs / "set-up")

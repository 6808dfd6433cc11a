"""Loops run wherever their machine code can be kept, and where it cannot."""

import errno
from pathlib import Path
from typing import Any

import numba
import pytest
from numba.core import caching

from mlip.dataloading.compiled import compiled


def _double(number):
    return 2 * number


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))


def test_a_loop_is_kept_on_disk_read_again_and_runs_without_pythons_lock(tmp_path: Path) -> None:
    first: Any = compiled(_double)
    second: Any = compiled(_double)
    assert first(3) == 6 and list(tmp_path.rglob("*.nbi"))
    assert second(3) == 6
    hits = [sum(loop.stats.cache_hits.values()) for loop in (first, second)]
    assert hits == [0, 1] and first.targetoptions["nogil"]


@pytest.mark.parametrize("part", ["save", "load"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_a_folder_without_room_costs_the_keeping_and_not_the_call(
    monkeypatch: pytest.MonkeyPatch, part: str, code: int
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(code, "")

    monkeypatch.setattr(caching.IndexDataCacheFile, part, fail)
    assert compiled(_double)(3) == 6


def test_nowhere_to_keep_it_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert compiled(_double)(3) == 6

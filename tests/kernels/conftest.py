"""Lets gpu_check.py share the GPU tests out: most of their time is compilation, on the CPU."""

from __future__ import annotations

import os

import pytest

SHARE_VARIABLE = "MLIP_TEST_SHARE"  # "2/4": the third of four equal shares


@pytest.hookimpl(trylast=True)  # after -m has left its choice
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    share = os.environ.get(SHARE_VARIABLE)
    if share:
        index, count = map(int, share.split("/"))
        items[:] = items[index::count]

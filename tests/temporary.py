"""Folders that are shared by the tests of one process and gone with it."""

from __future__ import annotations

import atexit
import shutil
from pathlib import Path
from tempfile import mkdtemp


def shared_folder(name: str) -> Path:
    """A new folder, removed when this process ends."""
    folder = Path(mkdtemp(prefix=f"mlip-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder

"""Which packages are installed, without importing any."""

from __future__ import annotations

import importlib.metadata


def version_of(distribution: str) -> str | None:
    """Of an installed distribution; None where it is not."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None

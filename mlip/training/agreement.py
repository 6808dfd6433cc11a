"""That all ranks run one training: before the first step each is held against rank 0.

A node with other settings, code or reports does not fail. Its weights drift away from the others',
pairs are trained twice or never, and rank 0's log and checkpoints show nothing of it.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from mlip.ranks import distributed
from mlip.settings.config import Config, ConfigError, flatten, to_dict

# What a node may have of its own: where its copy of the data lies, and what its processors carry.
NODE_SETTINGS = (
    "data.manifest",
    "data.root",
    "data.workers",
    "data.prefetch",
    "knowledge.cache_dir",
    "run.threads",
)
_SHOWN = 3  # differences


def settings_of(config: Config) -> dict[str, Any]:
    """Dotted key -> value of every setting that must be the same on all nodes."""
    return {k: v for k, v in flatten(to_dict(config)).items() if k not in NODE_SETTINGS}


def require_same(facts: Mapping[str, Any], remedy: str) -> None:
    """A collective call. The facts' values are shown where they differ.

    Raises:  ConfigError on every rank, naming the first rank that differs from rank 0, and in what.
    """
    told = distributed.gather_objects((socket.gethostname(), dict(facts)))
    (first_host, first), *others = told
    for rank, (host, own) in enumerate(others, start=1):
        keys = [k for k in {**first, **own} if first.get(k) != own.get(k)]
        if keys:
            shown = ", ".join(
                f"{k} is {_short(own.get(k))} (rank 0: {_short(first.get(k))})"
                for k in keys[:_SHOWN]
            )
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            raise ConfigError(
                f"rank {rank} on {host} is not as rank 0 on {first_host}: {shown}{more}; {remedy}"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

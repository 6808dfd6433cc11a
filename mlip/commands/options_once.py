"""A parser that refuses an option of one value which a command line gives two."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any


class Parser(argparse.ArgumentParser):
    """An ArgumentParser, for one parse: `--out a --out b` ends as any wrong argument does.

    argparse takes the last one, and nothing would say what became of the first. Options that may be
    repeated (append, extend) and flags are what they were; the same value twice is one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in (None, "store"):  # None: what add_argument takes where it is told no action
            self.register("action", name, _Once)


class _Once(argparse.Action):
    """Stores a value, and refuses another one; a positional argument has only one."""

    _given: Any = None

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if option_string is not None:
            if self._given is not None and self._given != values:
                raise argparse.ArgumentError(
                    self, f"given as {self._given} and as {values}: expected one of them"
                )
            self._given = values
        setattr(namespace, self.dest, values)

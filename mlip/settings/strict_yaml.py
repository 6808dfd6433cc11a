"""YAML as this project reads it: plain values only, and no key twice."""

from __future__ import annotations

import re
from typing import Any

import yaml

_DEEPEST = 1000  # levels; the C parser, which calls itself for each, kills the process at 20,000


# the C parser reads the lexicon in a tenth of the time; the pure one gives the same result
class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A SafeLoader that refuses a key that stands twice: the first one's value would be lost."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines and name != "<<":
                raise yaml.YAMLError(
                    f"{name!r} stands in lines {lines[name]} and {line}: join them"
                )
            lines[name] = line
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


def _require_flat(text: str) -> None:
    """Raises:  yaml.YAMLError for a text of more than _DEEPEST levels."""
    # each level takes one of these marks or one blank more in front: most texts have too few
    marks = sum(text.count(mark) for mark in ("[", "{", "- ", "-\t", "? ", "?\t"))
    if marks + max(map(len, re.findall(r"^ *", text, re.MULTILINE))) < _DEEPEST:
        return
    level = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            level += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            level -= 1
        if level > _DEEPEST:
            line = event.start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: expected at most {_DEEPEST} levels of nesting")


def read_yaml(text: str) -> Any:
    """The values of a YAML text.

    Raises:  yaml.YAMLError, also for a key that stands twice, and for more than 1,000 levels
    """
    _require_flat(text)
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, TypeError, RecursionError) as error:  # a date of month 13, a tag that lies
        raise yaml.YAMLError(str(error)) from error

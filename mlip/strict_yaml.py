"""YAML as this project reads it: plain values only, and no key twice."""

from __future__ import annotations

from typing import Any

import yaml


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


def read_yaml(text: str) -> Any:
    """The values of a YAML text.  Raises:  yaml.YAMLError, also for a key that stands twice."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, TypeError, RecursionError) as error:  # a date of month 13, a tag that lies
        raise yaml.YAMLError(str(error)) from error

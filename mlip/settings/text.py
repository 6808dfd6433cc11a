"""How `mlip settings` shows settings in a terminal, and docs/settings.md as a page.

What is shown is read by reference.py. Nothing here depends on the terminal: a pipe gets the same
lines.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from operator import attrgetter, getitem

from mlip.settings.config import Config, Named
from mlip.settings.given import leaf_names, named_settings
from mlip.settings.reference import Section, Setting, value_text
from mlip.settings.typed_tree import all_keys

TITLE = "# Settings"
_COLUMNS, _PAGE_COLUMNS = 80, 100
_ABOUT = (
    "Every setting of `train.py` and `mlip`, section by section, with its default. The same in a "
    "terminal:"
)
_COMMANDS = """
    mlip settings crop                                                     # settings with this word in name or description
    mlip settings data.columns train.lr                                    # a section and a setting, by their names
    mlip settings train.lr --config configs/real_cxr.yaml train.lr=1e-3    # with its value, and where that comes from
    mlip settings --out docs/settings.md                                   # this page
"""  # noqa: E501
_BEFORE = (
    "In a YAML file a section is a mapping (`train: {lr: 1.0e-3}`). On a command line a setting is "
    "typed as `train.lr=1.0e-3`, after the files. A later file wins over an earlier one, what is "
    "typed wins over files, and of one setting typed twice the last counts. `null` is no value. "
    "[training.md](training.md) explains pair, tower, rank and val, and "
    "[which typed settings are refused](training.md#before-the-first-step).",
    "The words about a setting stand beside it in the code "
    "([mlip/settings/config.py](../mlip/settings/config.py), "
    "[losses.py](../mlip/settings/losses.py), "
    "[evaluate.py](../mlip/settings/evaluate.py), "
    "[transfer.py](../mlip/settings/transfer.py)). This page is made of them, so change "
    "them there.",
)


def listing(sections: Iterable[Section]) -> Iterator[str]:
    """Lines of all settings, each section under its name and what it is of."""
    for index, section in enumerate(sections):
        if index:
            yield ""
        yield from _wrapped(f"[{section.name}] {section.words}", "", "  ")
        for setting in section.settings:
            yield from block(setting)


def block(setting: Setting, value: str | None = None) -> Iterator[str]:
    """Lines of one setting, at most 80 columns where no word is longer.

    value  what it comes to, and where from
    """
    head = f"{setting.name}  {setting.kind}; default {setting.default}"
    yield from _wrapped(head, "", "    ")
    if value is not None:
        yield from _wrapped(f"= {value}", "    ", "      ")
    yield from _wrapped(setting.words, "    ", "    ")


def _wrapped(text: str, first: str, later: str, columns: int = _COLUMNS) -> list[str]:
    return textwrap.wrap(
        text,
        columns,
        initial_indent=first,
        subsequent_indent=later,
        break_long_words=False,  # a path is copied whole
        break_on_hyphens=False,
    )


def values(config: Config, named: Iterable[Named]) -> dict[str, str]:
    """Setting -> its value and what it comes from.

    named  what config.read gave, of which the config is made
    """
    origins: dict[str, list[str]] = {}
    for file, tree in named:
        for name in named_settings(tree):
            value = reduce(getitem, name.split("."), tree)
            # entries of several files stand side by side; everything else is replaced whole
            before = origins.get(name, []) if isinstance(value, Mapping) and value else []
            now = "typed" if file is None else f"from {file}"
            origins[name] = [origin for origin in before if origin != now] + [now]
    return {
        name: f"{value_text(attrgetter(name)(config))} "
        f"({', then '.join(origins.get(name, ['the default']))})"
        for name in leaf_names()
    }


def page(sections: Iterable[Section]) -> str:
    """docs/settings.md."""
    lines = [TITLE, "", *_wrapped(_ABOUT, "", "", _PAGE_COLUMNS), *_COMMANDS.rstrip().split("\n")]
    for paragraph in _BEFORE:
        lines += ["", *_wrapped(paragraph, "", "", _PAGE_COLUMNS)]
    for section in sections:
        lines += ["", f"## {section.name}", "", *_wrapped(section.words, "", "", _PAGE_COLUMNS), ""]
        lines += ["| setting | type and range | default | what it does |", "|---|---|---|---|"]
        lines += [_row(setting) for setting in section.settings]
    return "\n".join(lines) + "\n"


def _row(setting: Setting) -> str:
    known = set(all_keys(Config))

    def as_code(match: re.Match[str]) -> str:
        return f"`{match[0]}`" if match[0] in known else match[0]

    # names of other settings as such, but not inside what is marked already
    words = re.sub(r"`[^`]*`|\b\w+(?:\.\w+)+", as_code, setting.words)
    cells = (f"`{setting.name}`", setting.kind, f"`{setting.default}`", words)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

"""The pages of templates/: HTML files that stand alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from mlip.system.output_file import whole_file

TEMPLATES = Path(__file__).with_name("templates")


# compiled templates stay in it: a quarter of a page's time
_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render_page(template: str, context: Mapping[str, Any]) -> str:
    """The page of a template as text."""
    # the style sheet is ours and holds no markup; everything else stays escaped
    css = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
    return _ENVIRONMENT.get_template(template).render(context, css=css)


def write_page(path: Path, page: str, *, require_own: Callable[[Path], None] | None = None) -> Path:
    """The page as a file, for its owner alone: it may show films; its path.

    require_own  as of whole_file
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, is_private=True, require_own=require_own) as partial:
        partial.write_text(page, encoding="utf-8")
    return path


def dotted(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Settings by dotted key; an empty section is a value, for the page to show."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(dotted(value, f"{path}{key}."))
        else:
            flat[f"{path}{key}"] = value
    return flat

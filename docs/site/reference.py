"""What Sphinx is told beside conf.py: the side bar on the front page, and the API reference.

The reference is read from the sources alone (ast): nothing of the project is imported, so a machine
without torch, DALI or a GPU builds the same pages. A docstring's aligned lists become field lists.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.domains import python
from sphinx.util.docutils import SphinxDirective

Function = ast.FunctionDef | ast.AsyncFunctionDef
Assignment = ast.Assign | ast.AnnAssign
Definition = Function | ast.ClassDef | Assignment
Content = list[nodes.Node]
DIRECTIVES: dict[str, Any] = {
    "module": python.PyModule,
    "function": python.PyFunction,
    "class": python.PyClasslike,
    "exception": python.PyClasslike,
    "attribute": python.PyAttribute,
    "data": python.PyVariable,
    "property": python.PyProperty,
    "method": python.PyMethod,
}
# of other words than these, two blanks say that it is a section
SECTION = re.compile(r"(Shapes|Returns|Units|Errors|Raises|Source|[A-Z][a-z]+(?=:  )): +(.*)")
ROW = re.compile(r"( *)(\S.{0,40}?) {2,}(\S.*)")  # name, two blanks or more, what it is


class Source:
    """One module's file: its tree, and its lines for the comments that no tree keeps."""

    def __init__(self, root: Path, module: str) -> None:
        path = root / module.replace(".", "/")
        self.root, self.module = root, module
        self.path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        text = self.path.read_text("utf-8")
        self.lines, self.tree = text.splitlines(), ast.parse(text)
        self.doc = ast.get_docstring(self.tree) or ""

    def names(self) -> list[str]:
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                return list(ast.literal_eval(node.value))
        made = [node for node in self.tree.body if isinstance(node, Function | ast.ClassDef)]
        return list(dict.fromkeys(node.name for node in made if node.name[0] != "_"))

    def find(self, name: str) -> tuple[Source, Definition]:
        """Where a name is defined, through any number of imports of ours."""
        for node in reversed(self.tree.body):  # the last of several is the one that counts
            if isinstance(node, Function | ast.ClassDef) and node.name == name:
                return self, node
            if isinstance(node, Assignment):
                left = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if ast.unparse(left) == name:
                    return self, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return Source(self.root, node.module or "").find(alias.name)
        raise ValueError(f"{self.module}: expected the name {name} (listed in docs/site/conf.py)")

    def comment(self, node: ast.stmt) -> str:
        """The comment behind a line, after the comment lines above it."""
        behind = self.lines[(node.end_lineno or 0) - 1].encode()[node.end_col_offset or 0 :]
        found = [re.sub(r"^,?\s*#\s?", "", behind.decode())]
        line = node.lineno - 2
        while self.lines[line].lstrip().startswith("#"):
            found.insert(0, self.lines[line].strip().removeprefix("#").strip())
            line -= 1
        return " ".join(found).strip()


def _inline(text: str) -> Content:
    """Text with what stands in backticks as code; nothing else is markup in a docstring."""
    parts = re.split(r"`+([^`]+)`+", text)
    return [nodes.literal(p, p) if i % 2 else nodes.Text(p) for i, p in enumerate(parts) if p]


def _is_code(block: str) -> bool:
    try:
        first = ast.parse(block).body[0]
    except (SyntaxError, IndexError):
        return False
    return isinstance(first, ast.Import | ast.ImportFrom | ast.Assign)


def rendered(doc: str | None) -> Content:
    """A docstring's paragraphs, code, sections ("Raises:  ...") and aligned lists as nodes."""
    made: Content = []
    if not doc:
        return made
    for block in re.split(r"\n\s*\n", doc.strip()):
        if _is_code(textwrap.dedent(block)):
            code = textwrap.dedent(block)
            made.append(nodes.literal_block(code, code, language="python"))
            continue
        for head, words in _items(block):
            if head is None:
                made.append(nodes.paragraph("", "", *_inline(words)))
                continue
            if not (made and isinstance(made[-1], nodes.field_list)):
                made.append(nodes.field_list())
            name = nodes.field_name("", "", *_inline(head))
            body = nodes.field_body("", nodes.paragraph("", "", *_inline(words)))
            made[-1] += nodes.field("", name, body)
    return made


def _items(block: str) -> Iterator[tuple[str | None, str]]:
    """(None, a paragraph) or (head, text) of an aligned list, continued lines put together."""
    head, words, depth = None, "", 0
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        section, row = SECTION.match(line), ROW.match(line)
        continues = words and (indent > depth if head is not None else not (section or row))
        if continues:
            words += " " + line.strip()
            continue
        if words:
            yield head, words
        if section:
            head, words, depth = section[1], section[2], 0
        elif row:
            head, words, depth = f"`{row[2]}`", row[3], indent
        else:
            head, words, depth = None, line.strip(), 0
    yield head, words


def _signature(node: Function, is_bound: bool = False) -> str:
    arguments = ast.parse(ast.unparse(node)).body[0].args  # type: ignore[attr-defined]
    if is_bound:
        del (arguments.posonlyargs or arguments.args)[0]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(arguments)}){returns}"


def _decorators(node: Function | ast.ClassDef) -> set[str]:
    return {ast.unparse(one).split("(")[0].split(".")[-1] for one in node.decorator_list}


class Members(SphinxDirective):
    """```{members} module``` : what conf.py lists of a module."""

    required_arguments = 1
    listed: dict[str, str] = {}
    root = Path()

    def run(self) -> Content:
        module = self.arguments[0]
        source = Source(self.root, module)
        self.env.note_dependency(str(source.path))
        made = [*self._made("module", module), *rendered(source.doc)]
        for name in self.listed[module].split() or source.names():
            owner, node = source.find(name)
            self.env.note_dependency(str(owner.path))
            made += self._object(owner, node, name)
        return made

    def _made(
        self, kind: str, signature: str, content: Content | None = None, **options: Any
    ) -> Content:
        """What Sphinx's own directive of this kind makes, with our content in it."""
        directive = DIRECTIVES[kind](
            f"py:{kind}", [signature], options, StringList(), self.lineno, 0, "", self.state,
            self.state_machine,
        )  # fmt: skip
        found: list[nodes.Node] = directive.run()
        if content:
            found[-1][-1].extend(content)
        return found

    def _object(self, source: Source, node: Definition, name: str) -> Content:
        if isinstance(node, ast.ClassDef):
            return self._class(source, node, name)
        if isinstance(node, Function):
            return self._made(
                "function", name + _signature(node), rendered(ast.get_docstring(node))
            )
        return self._field("data", source, node, name)

    def _field(self, kind: str, source: Source, node: Assignment, name: str) -> Content:
        options = {"value": ast.unparse(node.value)} if node.value else {}
        if isinstance(node, ast.AnnAssign):
            options["type"] = ast.unparse(node.annotation)
        return self._made(kind, name, rendered(source.comment(node)), **options)

    def _class(self, source: Source, node: ast.ClassDef, name: str) -> Content:
        functions = [one for one in node.body if isinstance(one, Function)]
        starts = [one for one in functions if one.name == "__init__"]
        signature = name + (_signature(starts[-1], True).split(" -> ")[0] if starts else "")
        content = rendered(ast.get_docstring(node))
        if bases := ", ".join(f"`{ast.unparse(base)}`" for base in node.bases):
            content.insert(0, nodes.paragraph("", "", *_inline(f"Bases: {bases}")))
        found = self._made("exception" if name.endswith("Error") else "class", signature)
        # what PyClasslike does around content of its own: members' names begin with the class's
        context = self.env.ref_context
        context["py:classes"], context["py:class"] = [name], name
        for one in node.body:
            if isinstance(one, ast.AnnAssign) and ast.unparse(one.target)[0] != "_":
                content += self._field("attribute", source, one, ast.unparse(one.target))
        for one in functions:
            if one.name[0] != "_" and "overload" not in _decorators(one):
                content += self._method(one)
        context["py:classes"], context["py:class"] = [], None
        found[-1][-1].extend(content)
        return found

    def _method(self, node: Function) -> Content:
        kinds, doc = _decorators(node), rendered(ast.get_docstring(node))
        if kinds & {"property", "cached_property"}:
            options = {"type": ast.unparse(node.returns)} if node.returns else {}
            return self._made("property", node.name, doc, **options)
        signature = node.name + _signature(node, is_bound="staticmethod" not in kinds)
        flags = dict.fromkeys(kinds & {"classmethod", "staticmethod"})
        return self._made("method", signature, doc, **flags)


def write_pages(root: Path, modules: dict[str, dict[str, str]]) -> None:
    """docs/api: one page that lists the modules, and one for each; git ignores them."""
    folder = root / "docs" / "api"
    folder.mkdir(exist_ok=True)
    index = "# API reference\n\nWhat other code may import, by module.\n"
    pages = {}
    for heading, names in modules.items():
        index += f"\n## {heading}\n\n"
        for module in names:
            line = Source(root, module).doc.partition("\n")[0]
            escaped = re.sub(r"([\\*_<\[])", r"\\\1", line)
            index += f"- [{module}]({module}.md): {escaped}\n"
            pages[f"{module}.md"] = f"# {module}\n\n```{{members}} {module}\n```\n"
        index += "\n```{toctree}\n:hidden:\n\n" + "".join(f"{m}\n" for m in names) + "```\n"
    for old in folder.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    for name, text in {**pages, "index.md": index}.items():
        file = folder / name
        # an unchanged page is not read again
        if not file.is_file() or file.read_text("utf-8") != text:
            file.write_text(text, "utf-8")


def _short(page: Path) -> str:
    """A page's title without what comes behind a colon."""
    first = page.read_text("utf-8").partition("\n")[0] if page.is_file() else "# API reference"
    return first.removeprefix("# ").partition(":")[0]


def setup(app: Any, root: Path, pages: dict[str, list[str]], modules: dict[str, Any]) -> None:
    Members.listed = {name: names for part in modules.values() for name, names in part.items()}
    Members.root = root
    app.add_directive("members", Members)
    side_bar = ""
    for heading, paths in pages.items():
        lines = "".join(f"{_short(root / path)} </{path.removesuffix('.md')}>\n" for path in paths)
        side_bar += f"\n\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{lines}```\n"

    def add_side_bar(_: Any, page: str, text: list[str]) -> None:
        if page == "README":
            text[0] += side_bar

    def write_front_page(app: Any, error: Exception | None) -> None:
        if error is None and app.builder.format == "html":
            front = Path(app.outdir, "README.html")
            front.with_name("index.html").write_bytes(front.read_bytes())

    app.connect("builder-inited", lambda _: write_pages(root, modules))
    app.connect("source-read", add_side_bar)
    app.connect("build-finished", write_front_page)

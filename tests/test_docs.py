"""What the pages print holds: links, commands, settings, files, names in code, and figures that
are copied from benchmarks/results (other tables are written by the benchmarks themselves).

Python blocks are run where their parts are tested (tests/kernels/test_readme_blocks.py,
tests/transfer/films/test_own_inputs.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import mlip.cli
import mlip.commands.arguments
import train
from benchmarks import bench_grad_cache, bench_same_pictures, bench_search, linker_read
from benchmarks.bench_demo import tables
from benchmarks.bench_outliers import page_table
from mlip.cli import FOREIGN, build_parser
from mlip.commands.inputs import read_given
from mlip.saved.pretrained_model import Pretrained
from mlip.settings.config import Config
from tests.test_architecture import WALLS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "kernels/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"\s*((?:\.venv/bin/)?(?:mlip|python3?|deepspeed|torchrun|make)) (?!= )")
TOP = ("mlip", "kernels", "dataloading", "tests", "benchmarks", "configs", "docs", "constraints")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _inline(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", FENCED.sub("", text))


def _anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "LOG.md"], ids=_name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def _commands(page: Path) -> list[str]:
    """Lines and spans that a shell would be given, continued lines put together."""
    text = page.read_text("utf-8")
    if page.suffix == ".yaml":
        text = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#   "))
    text = text.replace("\\\n", " ")
    found = [line for line in [*text.splitlines(), *_inline(text)] if COMMAND.match(line)]
    return [line.split(" #")[0].strip() for line in found]


PRINTED = [(page, line) for page in [*PAGES, *CONFIGS] for line in _commands(page)]


@pytest.mark.parametrize(("page", "line"), PRINTED, ids=[f"{_name(p)}: {c}" for p, c in PRINTED])
def test_every_command_is_taken(page: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options are there, its settings load, and a training says which data it reads."""
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(line)
    if "..." in words or "CONFIG" in words or not words:
        return  # a form to be filled in
    if program == "make":
        assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text("utf-8")
    elif program == "mlip":
        _check_mlip(words)
    elif "train.py" in words:
        # the folder of an export, which lies on no page: any settings do in its place
        words = ["configs/demo.yaml" if f"train.start={w}" in words else w for w in words]
        _, config = train.parse(words[words.index("train.py") + 1 :])
        assert config.data.manifest, "data.manifest is not set"
    elif words[:1] == ["-m"]:
        assert words[1] == "pytest" or importlib.util.find_spec(words[1]) is not None
        assert all((ROOT / word).is_file() for word in words[2:] if word.endswith(".py"))
    elif words[0].endswith(".py"):
        script = (ROOT / words[0]).read_text("utf-8")
        known = [w for w in words[1:] if w.startswith("-")]
        if words[1:] and not words[1].startswith("-"):
            known.append(words[1])
        assert [word for word in known if f'"{word}"' not in script] == []
    else:
        assert program == "torchrun", "a command of a kind that nothing here reads"


def _check_mlip(words: list[str]) -> None:
    module = importlib.import_module(FOREIGN.get(words[0], ("mlip.commands.arguments",))[0])
    named = len(words) == 1 or (words[0] in FOREIGN and len(words) == 2)
    if named or words[-1].startswith("--"):  # of a command or of an option, no call
        assert all(f'"{word}"' in inspect.getsource(module) for word in words[1:] if word[0] == "-")
        known = inspect.getsource(mlip.cli) + inspect.getsource(mlip.commands.arguments)
        assert f'"{words[0]}"' in known
        return
    if words[0] in FOREIGN:
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        parser.parse_args(words[1:])
        return
    options, rest = build_parser().parse_known_args(words)
    assert not [word for word in rest if word.startswith("-")]
    if options.command == "settings":
        assert options.out or mlip.cli.main(words) == 0
        return
    settings = [*getattr(options, "settings", []), *rest, *(getattr(options, "plan", None) or [])]
    if any(word.startswith("runs/") for word in settings):
        return  # the settings that a run has kept
    config = read_given(settings).config
    if options.command in ("evaluate", "embed"):
        assert config.data.manifest, "data.manifest is not set"


SECTIONS = "|".join(field.name for field in dataclasses.fields(Config))


def _is_setting(key: str) -> bool:
    found: object = Config()
    for part in key.split("."):
        if isinstance(found, dict):
            return True  # of a table that the user fills
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


@pytest.mark.parametrize("page", [*PAGES, *CONFIGS], ids=_name)
def test_every_setting_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text("utf-8")
    spans = [text] if page.suffix == ".yaml" else _inline(text)
    spans += [line for line in text.splitlines() if COMMAND.match(line)]
    named = re.compile(rf"(?<![\w./-])(?:{SECTIONS})\.[a-z_0-9]+(?:\.[a-z_0-9]+)*")
    # files, modules and what results.json holds have names of the same form
    other = re.compile(r"\.(?:py|md|safetensors)$|^data\.unused$|^transfer\.own_inputs")
    found = [key for span in spans for key in named.findall(span) if not other.search(key)]
    assert [key for key in found if not _is_setting(key)] == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_file_and_every_name_in_code_is_there(page: Path) -> None:
    text = page.read_text("utf-8")
    for path in re.findall(rf"(?<![\w./-])(?:{'|'.join(TOP)})/[\w./*-]+\w", text):
        if "<" not in text[text.index(path) : text.index(path) + len(path) + 2]:
            assert any(ROOT.glob(path)), path
    for name in re.findall(r"\bmlip(?:\.[A-Za-z_]\w*)+", text):
        assert _resolves(name.split(".")), name


def test_every_page_that_a_source_names_is_there() -> None:
    names = {page.name for page in PAGES} | {"LOG.md"}
    sources = [ROOT / "train.py", *CONFIGS]
    for folder in ("mlip", "kernels", "dataloading", "benchmarks"):
        sources += (ROOT / folder).rglob("*.py")
    named = {
        (_name(source), page)
        for source in sources
        for page in re.findall(r"\b\w+\.md\b", source.read_text("utf-8"))
    }
    assert [found for found in sorted(named) if found[1] not in names] == []


# files of others that ours are made after, or whose frames are looked for
OF_OTHERS = {
    *("ssl_finetuner.py", "ssl_detector.py", "ssl_segmenter.py", "yolo_loss.py"),
    *("segmentation_dataset.py", "src/open_clip/loss.py", "triton/runtime/build.py"),
    *("zero/partition_parameters.py", "utils/nvtx.py"),
}


def test_every_module_that_a_source_names_is_where_its_reader_looks() -> None:
    """By its path from the root or from mlip/ or dataloading/, or as seen from the naming file."""
    sources = [ROOT / "train.py", *CONFIGS]
    for folder in ("mlip", "kernels", "dataloading", "benchmarks"):
        sources += (ROOT / folder).rglob("*.py")
    named = {
        (source, file)
        for source in sources
        for file in re.findall(r"(?<![\w./{}*-])[\w./-]*\w\.py\b", source.read_text("utf-8"))
    }
    lost = [
        (_name(source), file)
        for source, file in sorted(named)
        if file not in OF_OTHERS
        and not any(
            (place / file).is_file()
            for place in (ROOT, ROOT / "mlip", ROOT / "dataloading", *source.parents[:2])
        )
    ]
    assert len(named) > 200 and lost == []
    assert OF_OTHERS <= {file for _, file in named}


def _resolves(parts: list[str]) -> bool:
    for length in range(len(parts), 1, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        if found is not None:
            return True
    # what a page opens under the name `mlip`
    return hasattr(Pretrained, parts[1]) or parts[1] in Pretrained.__dataclass_fields__


@pytest.mark.parametrize(
    "package",
    ["deepspeed", "nvidia", "triton", "pydicom", "imagecodecs", "transformers", "wandb", "mlflow"],
)
def test_the_page_for_contributors_names_the_walls_that_hold(package: str) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert [place for place in WALLS[package] if place not in page] == []


def _results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("mark", "variants", "seeds"),
    [
        ("demo table", ("mlip", "clip", "mgca", "no_knowledge"), (1, 2, 3)),
        ("knowledge table", ("mlip", "no_knowledge"), (1, 2, 3, 4, 5, 6)),
    ],
)
def test_the_demos_tables_are_those_of_their_rows(
    mark: str, variants: tuple[str, ...], seeds: tuple[int, ...]
) -> None:
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    kept = {(row["variant"], row["seed"]): row for row in _results("demo")}
    rows = {name: [kept[name, seed] for seed in seeds] for name in variants}
    assert f"<!-- {mark}: begin -->\n{tables(rows)}\n<!-- {mark}: end -->" in page


def test_the_linkers_table_is_that_of_its_rows() -> None:
    page, score = (
        (ROOT / "docs" / "knowledge.md").read_text("utf-8"),
        _results("linker_test")["score"],
    )
    for name, found in score["per_finding"].items():
        precision, star = found["precision"], "*" if name in score["top14"] else ""
        row = f"| {name.replace('_', ' ')}{star} | {found['positives']} | {precision['value']:.3f} "
        row += (
            f"({precision['low']:.3f} to {precision['high']:.3f}) | {found['recall']['value']:.3f} "
        )
        row += f"| {found['f1']['value']:.3f} | {found['false_positives']} "
        assert f"{row}| {found['false_negatives']} |" in page
    causes = [int(n) for n in re.findall(r"^\| [^|]+ \| (\d+) \|$", page, re.MULTILINE)]
    assert sorted(causes) == sorted(score["miss_causes_top14"].values())
    assert f"test half: {sum(causes)})" in page


def test_the_table_of_reports_read_by_hand_is_that_of_its_row() -> None:
    page = (ROOT / "docs" / "knowledge.md").read_text("utf-8")
    made = linker_read.page_table(_results("linker_read")["read"])
    assert f"<!-- reports read: begin -->\n{made}\n<!-- reports read: end -->" in page


def test_the_outliers_table_is_that_of_its_rows() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    made = page_table(_results("outliers"))
    assert f"<!-- outliers: begin -->\n{made}\n<!-- outliers: end -->" in page


def test_the_gradient_caches_table_is_that_of_its_rows() -> None:
    page = (ROOT / "docs" / "losses.md").read_text("utf-8")
    made = bench_grad_cache.page_table(_results("grad_cache"))
    assert f"<!-- gradient cache: begin -->\n{made}\n<!-- gradient cache: end -->" in page


def test_the_tables_of_films_that_look_the_same_are_those_of_their_rows() -> None:
    page = (ROOT / "docs" / "datasets.md").read_text("utf-8")
    made = bench_same_pictures.page_table(_results("same_pictures"))
    assert f"<!-- same pictures: begin -->\n{made}\n<!-- same pictures: end -->" in page


def test_the_search_table_is_that_of_its_rows() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    made = bench_search.page_tables(_results("search"))
    assert f"<!-- search: begin -->\n{made}\n<!-- search: end -->" in page


@pytest.mark.parametrize("rows", ["transfer_ablation", "transfer_real"])
def test_every_score_of_the_transfer_tables_is_that_of_its_rows(rows: str) -> None:
    page = (ROOT / "docs" / "transfer.md").read_text("utf-8").replace("**", "")
    shown = ("macro AUROC", "Dice, images with truth only", "Dice, all pixels pooled")
    shown += ("mAP, strict (every image)",)
    cells = [
        f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}] +- {e['seed_sd']:.3f}"
        for methods in _results(rows)["tasks"].values()
        for (cell, *_) in methods.values()
        for scores in cell.get("fractions", {}).values()
        for name, e in scores.items()
        if name in shown
    ]
    assert len(cells) > 8 and [cell for cell in cells if cell not in page] == []


def test_no_row_names_a_folder_of_the_machine_it_was_measured_on() -> None:
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        found = re.search(r"[\"=]/(tmp|root|home|work|mnt|data|Users)/[^\"]*", path.read_text())
        assert found is None, f"{path.name}: {found and found[0]}"

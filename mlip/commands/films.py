"""The sub-commands of `mlip` on a user's own films: ground, embed, search, outliers, classify.

Nothing that needs another package is imported before it is used (mlip/cli.py says what is missing).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlip.commands.inputs import (
    keep_memory,
    open_for_films,
    open_trained,
    open_with_settings,
    pick_device,
    read_given,
)
from mlip.settings.typed_tree import ConfigError
from mlip.system.output_file import KeptBesideError, refusal, require_writable
from mlip.system.unread_output import terminal_text

if TYPE_CHECKING:
    from mlip.settings.given import Given
    from mlip.transfer.films.archive import Archive


def run_ground(options: argparse.Namespace) -> int:
    from mlip.saved.trained_model import open_checkpoint
    from mlip.transfer.films.ground_image import (
        DICOM_SUFFIX,
        ground_image,
        require_own_map,
        write_map,
    )
    from mlip.transfer.trained_heads import require_local

    out, device = Path(options.out), pick_device(options.device)
    require_writable(out.parent)
    if out.is_dir() or out.suffix.lower() not in (".png", DICOM_SUFFIX):
        raise ConfigError(
            f"--out {out}: expected the name of a PNG or DICOM file, for example map.png or map.dcm"
        )
    require_own_map(out)
    opened = open_checkpoint(options.checkpoint, device=device, lexicon=options.lexicon)
    require_local(opened, "maps of words")
    answers, picture = ground_image(
        opened, Path(options.image), options.phrases, out, with_parts=options.words
    )
    for answer in answers:
        if len(answers) > 1:
            print(f'"{answer.phrase}"')
        x, y = answer.point
        print(f"points at x={x:.0f} y={y:.0f} of {answer.width_px} x {answer.height_px} px")
        print(f"best patch {answer.highest:+.3f}, mean {answer.mean:+.3f} (cosine; high = match)")
        linked = ", ".join(f"{name} ({state})" for name, state in answer.mentions) or "none"
        print(f"linked knowledge: {linked}")
        for part in answer.parts:
            hot, mean = part.heat.max(), part.heat.mean()
            print(f"  {part.name:<32} best patch {hot:+.3f}, mean {mean:+.3f}")
    write_map(out, picture)  # last: another's file may lie there by now, and the answers are told
    print(f"{options.out}\nNot for clinical use.")
    return 0


def run_embed(options: argparse.Namespace) -> int:
    from mlip.dataloading.manifest import load_manifest
    from mlip.transfer.films.embed import write_embeddings

    given = read_given(options.settings).asked_by(
        "mlip embed --images" if options.images else "mlip embed"
    )
    device = pick_device(options.device)
    keep_memory(device)
    out = require_writable(Path(options.out))
    split = options.split or ("all" if options.images else given.config.evaluate.split)
    if options.images:
        opened, manifest = open_for_films(given, device, by_patient=split != "all")
    else:
        opened, config = open_with_settings(given, device)
        opened, manifest = dataclasses.replace(opened, config=config), load_manifest(config.data)
    embedded = write_embeddings(
        *(opened, manifest, out),
        split=split,
        with_patches=options.patches,
        images_only=options.images,
        form=options.format,
        say=print,
    )
    print(f"{embedded} in {options.out}")
    return 0


def run_search(options: argparse.Namespace) -> int:
    from mlip.transfer.films import search_table
    from mlip.transfer.films.archive import Archive
    from mlip.transfer.films.search import ask

    given = read_given(options.settings).asked_by(
        "mlip search --finding" if options.finding else "mlip search"
    )
    device = pick_device(options.device)
    keep_memory(device)
    archive = Archive(options.embeddings)
    out, page = _search_files(options)
    _check_search(options)
    opened, manifest = _open_search(options, given, device, archive)
    queries = ask(
        *(archive, opened, given.config.evaluate),
        phrases=options.phrase,
        findings=options.finding,
        wordings=options.wordings,
        images=options.image,
        rows=options.row,
    )
    most = max(options.top, options.rerank or 0)
    groups = search_table.patients_of(manifest) if options.per_patient else None
    hits = search_table.search(archive, queries, most, among=options.among, groups=groups)
    bad: dict[int, str] = {}
    if options.rerank:
        hits, bad = search_table.reranked(opened, manifest, queries, hits, options.top)
    pictures: Any = None
    if page:  # before the table: where no film can be read, earlier answers stay
        pictures = search_table.pictures(opened, manifest, queries, hits)
    lines = list(search_table.told_lines(archive, queries, hits, options.among, bad))
    print(terminal_text(lines))
    beside: list[str] = []
    try:
        count = search_table.write_answers(out, queries, hits)
        print(terminal_text([f"{out}: {count} answers"]))
    except KeptBesideError as error:  # told at the end: the page is to be written, too
        beside.append(str(error))
    if page:
        options.out = options.page  # for the line where it cannot be written
        try:
            _write_search_page(page, lines[0], queries, hits, pictures, bool(options.rerank))
        except KeptBesideError as error:
            beside.append(str(error))
        except OSError as error:
            if not beside:
                raise
            # where the table lies is not to be lost with the page
            beside.append(refusal(error, page) or f"{page}: {error.strerror}")
    if beside:
        raise KeptBesideError("; ".join(beside))
    print("Not for clinical use.")
    return 0


def _search_files(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """(the table, the page or None)

    Raises:  ConfigError, OSError where one cannot be written, or would replace what is not its own
    """
    from mlip.pages.search_page import require_own_page
    from mlip.transfer.films.search_table import require_own_file

    out, page = Path(options.out), Path(options.page) if options.page else None
    for path in (out, *([page] if page else [])):
        require_writable(path.absolute().parent)
    require_own_file(out)
    if page:
        if page.resolve() == out.resolve():
            raise ConfigError(
                f"--page {page}: is --out too, which it would replace: name two files"
            )
        require_own_page(page)
    return out, page


def _open_search(
    options: argparse.Namespace, given: Given, device: str, archive: Archive
) -> tuple[Any, Any]:
    """(the model, None where rows alone ask; the manifest, None where no film is read)"""
    from mlip.transfer.films.search import require_same_model
    from mlip.transfer.films.search_table import require_same_rows
    from mlip.transfer.trained_heads import require_local

    opened: Any = None
    manifest: Any = None
    if options.page or options.rerank or options.per_patient:
        opened, manifest = open_for_films(
            given, device, by_patient=options.per_patient, by_split=False
        )
        require_same_rows(archive, manifest, given.config.data.columns.image)
    elif options.phrase or options.finding or options.wordings or options.image:
        opened = open_trained(given, device)
    if opened is not None:
        require_same_model(archive, opened)
        if options.rerank:
            require_local(opened, f"--rerank {options.rerank} (leave it out)")
    return opened, manifest


def _write_search_page(
    page: Path, title: str, queries: Any, hits: Any, pictures: Any, is_reranked: bool
) -> None:
    from mlip.pages.search_page import require_own_page, write_search_page
    from mlip.transfer.films.row_table import unread

    with contextlib.suppress(ConfigError, OSError):  # another's by now: it stays
        require_own_page(page)
        page.unlink(missing_ok=True)  # of other answers than the table's by now
    shown, unseen = pictures
    write_search_page(page, title, queries, hits, shown, is_reranked=is_reranked)
    print(f"{page}{unread(unseen)}")


def _check_search(options: argparse.Namespace) -> None:
    """Raises:  ConfigError for options that cannot be honoured together"""
    words = options.phrase or options.finding or options.wordings
    if not (words or options.image or options.row):
        raise ConfigError(
            "nothing is asked: expected --phrase, --finding, --wordings, --image or --row"
        )
    if options.top < 1:
        raise ConfigError(f"--top {options.top}: expected 1 or more")
    if options.rerank is None:
        return
    if options.rerank < options.top:
        raise ConfigError(
            f"--rerank {options.rerank}: expected at least --top {options.top}, as that many of "
            "the best are scored again"
        )
    if not words or options.among != "image":
        raise ConfigError(
            "--rerank scores images by words: it needs --phrase, --finding or --wordings, and "
            "--among image"
        )


def run_outliers(options: argparse.Namespace) -> int:
    from mlip.transfer.films.outlier_table import (
        require_own_table,
        write_outliers,
        write_reference,
    )
    from mlip.transfer.films.outliers import require_own_reference

    given = read_given(options.settings).asked_by("mlip outliers")
    device = pick_device(options.device)
    keep_memory(device)
    if options.fit and options.out:
        raise ConfigError(
            f"--out {options.out}: is the table of --reference; --fit writes its own file alone"
        )
    made = Path(options.fit or options.out or "outliers.csv")
    options.out = str(made)  # for the line where it cannot be written
    require_writable(made.absolute().parent)
    (require_own_reference if options.fit else require_own_table)(made)
    split = options.split or ("train" if options.fit else "all")
    opened, manifest = open_for_films(given, device, by_patient=bool(options.fit) or split != "all")
    if options.fit:
        write_reference(opened, manifest, made, split=split, say=_say)
    else:
        write_outliers(opened, manifest, Path(options.reference), made, split=split, say=_say)
    return 0


def run_classify(options: argparse.Namespace) -> int:
    from mlip.transfer.films.classify import (
        ask_as_evaluated,
        ask_names,
        ask_wordings,
        default_head,
    )
    from mlip.transfer.films.classify_table import require_own_file, write_classification
    from mlip.transfer.trained_heads import require_local

    given = read_given(options.settings).asked_by(
        "mlip classify --finding" if options.finding else "mlip classify"
    )
    device = pick_device(options.device)
    keep_memory(device)
    out = Path(options.out)
    require_writable(out.absolute().parent)
    require_own_file(out)
    wordings = None if options.wordings is None else ask_wordings(Path(options.wordings))
    opened, manifest = open_for_films(given, device, by_patient=options.split != "all")
    head = options.head or default_head(opened)
    if head != "global":
        require_local(opened, f"--head {head} (say --head global)")
    if wordings is not None:
        question = wordings
    elif options.like is not None:
        question = ask_as_evaluated(Path(options.like), opened, head)
    else:
        question = ask_names(options.finding, opened, opened.config.evaluate)
    write_classification(
        *(opened, manifest, question, out),
        split=options.split,
        head=head,
        say=_say,
    )
    print("Not for clinical use.")
    return 0


def _say(line: str) -> None:
    print(terminal_text([line]))

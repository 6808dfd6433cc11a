"""`mlip search`: what it ranks by, on thirty films; nobody is named."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlip.cli import main
from mlip.pages import search_page
from mlip.pretrained import open_checkpoint
from mlip.transfer.films.archive import Archive, Hits
from mlip.transfer.films.classify import ask_names
from mlip.transfer.films.search import Query, Reranked, ask_findings, heat_of, rows_found
from tests.small_run import small_export
from tests.transfer.small_manifest import ROWS, SECRETS, pictures, write


def embedded(folder: Path, *options: str, **columns: object) -> Path:
    settings = [*write(folder, **columns), f"checkpoint={small_export()}"]
    out = folder / "embeddings"
    assert main(["embed", *settings, "--out", str(out), *options]) == 0
    return out


def run(folder: Path, *options: str, root: Path | None = None, **columns: object) -> int:
    settings = [*write(folder, **columns), f"checkpoint={small_export()}"]
    settings += [f"data.root={root}"] if root else []
    where = ["--in", str(folder / "embeddings")]
    where += [] if "--out" in options else ["--out", str(folder / "found.csv")]
    return main(["search", *settings, *where, *options])


def found(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """query -> (row_index, score), by rank"""
    answers: dict[str, list[tuple[int, float]]] = {}
    with (folder / "found.csv").open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            own = answers.setdefault(f"{row['kind']} {row['query']}", [])
            assert int(row["rank"]) == len(own) + 1
            own.append((int(row["row_index"]), float(row["score"] or "nan")))
    return answers


def ranked(scores: np.ndarray) -> list[int]:
    return np.argsort(-scores, kind="stable").tolist()


def test_words_findings_and_films_rank_an_archive_by_what_the_model_says(tmp_path, capsys):
    embedded(tmp_path, "--images", split="", report="", labels="")
    film, second = pictures() / "11.png", pictures() / "23.png"
    asked = ["--phrase", "mild edema", "--finding", "Edema", "--image", str(film), "--row", "4"]
    asked += ["--finding", "pneumothorax"]  # each asked by its own sentences
    asked += ["--image", str(second)]
    capsys.readouterr()
    assert run(tmp_path, *asked, "--top", "7") == 0
    said, answers = capsys.readouterr().out, found(tmp_path)
    assert "searched the images of 30 rows" in said and "Not for clinical use" in said
    assert not any(secret in said + (tmp_path / "found.csv").read_text() for secret in SECRETS)
    assert str(film) not in said + (tmp_path / "found.csv").read_text()

    opened = open_checkpoint(small_export())
    images = opened.encode_images([pictures() / f"{i}.png" for i in range(ROWS)])
    by_phrase = opened.similarity(images, opened.encode_texts(["mild edema"]))[:, 0]
    by_finding = opened.classify(images, ["Edema"], "global")[:, 0]
    alike = (images.embedding.double() @ images.embedding.double().T).numpy()
    by_second = opened.classify(images, ["pneumothorax"], "global")[:, 0]
    own = {"phrase mild edema": by_phrase, "finding Edema": by_finding}
    own |= {"finding pneumothorax": by_second, "film 1": alike[11], "film 2": alike[23]}
    assert list(answers) == [*own, "row 4"]
    for name, scores in own.items():
        assert [row for row, _ in answers[name]] == ranked(scores)[:7], name
        kept = [score for _, score in answers[name]]
        np.testing.assert_allclose(kept, np.sort(scores)[::-1][:7], rtol=1e-4, atol=1e-5)
    assert answers["film 1"][0][0] == 11
    assert [r for r, _ in answers["row 4"]] == [r for r in ranked(alike[4]) if r != 4][:7]
    assert (tmp_path / "found.csv").stat().st_mode & 0o777 == 0o600


def test_reranked_by_both_heads_the_scores_are_those_of_classify(tmp_path, capsys):
    embedded(tmp_path, "--images")
    page = tmp_path / "found.html"
    asked = ["--finding", "Edema", "--phrase", "edema", "--row", "2", "--page", str(page)]
    assert run(tmp_path, *asked, "--top", "5", "--rerank", "12") == 0
    answers = found(tmp_path)
    opened = open_checkpoint(small_export())
    images = opened.encode_images([pictures() / f"{i}.png" for i in range(ROWS)])
    first = ranked(opened.classify(images, ["Edema"], "global")[:, 0])[:12]
    both = opened.classify(images, ["Edema"], "combined")[:, 0]
    expected = sorted(first, key=lambda row: -both[row])[:5]
    assert [row for row, _ in answers["finding Edema"]] == expected
    np.testing.assert_allclose(
        [score for _, score in answers["finding Edema"]], both[expected], rtol=1e-4, atol=1e-4
    )
    alike = (images.embedding.double() @ images.embedding.double().T).numpy()[2]
    assert [r for r, _ in answers["row 2"]] == [r for r in ranked(alike) if r != 2][:5]
    text = page.read_text()
    assert (
        text.count('alt="Film of row ') == 15 and text.count('alt="Map over the film of row ') == 10
    )
    assert "searched again (--rerank)" in text and "http" not in text.split("</style>")[1]
    assert not any(secret in text for secret in SECRETS)


def test_words_may_be_asked_as_a_phrase_and_as_a_finding(tmp_path):
    embedded(tmp_path, "--images")
    assert run(tmp_path, "--phrase", "Edema", "--finding", "Edema") == 0
    assert list(found(tmp_path)) == ["phrase Edema", "finding Edema"]


def test_equal_scores_are_in_the_order_of_rows_and_words_alone_need_films():
    texts: Any = object()
    queries = [Query("row", "1", np.zeros(2), row=1), Query("phrase", "a", np.zeros(2), texts)]
    hits = [Hits(np.array([9, 4]), np.array([2.0, 1.0])), Hits(np.array([8, 3, 5]), np.ones(3))]
    reranked = Reranked(None, queries, hits)
    assert reranked.rows.tolist() == [3, 5, 8]  # a row that asks is asked no more
    reranked._scores[1] = dict.fromkeys((3, 5, 8), 0.5)
    kept = reranked.hits(2)
    assert [own.row_index.tolist() for own in kept] == [[9, 4], [3, 5]]
    assert rows_found([*hits, *kept]).tolist() == [3, 4, 5, 8, 9]


def test_a_finding_is_shown_where_its_stating_sentences_are():
    opened = open_checkpoint(small_export())
    images = opened.encode_images([pictures() / "3.png", pictures() / "4.png"])
    question = ask_names(["Edema"], opened, opened.config.evaluate)
    (query,) = ask_findings(question, opened)
    stating = opened.encode_texts(question.prompts[0].positive)
    wanted = opened.heat_maps(images, stating).mean(axis=1)
    heat = heat_of(opened, query, images)
    assert heat is not None and len(question.prompts[0].positive) > 1
    np.testing.assert_allclose(heat, wanted, rtol=1e-5, atol=1e-6)


def test_a_patient_is_shown_once(tmp_path, capsys):
    def whose(i: int) -> str:
        return f"PATIENT-SECRET-{i % 6}"

    embedded(tmp_path, "--images", patient_id=whose, split="train")
    asked = ["--row", "4", "--phrase", "edema", "--per-patient", "data.columns.split=nowhere"]
    assert run(tmp_path, *asked, patient_id=whose, split="train") == 0  # asks for no split
    answers = found(tmp_path)
    assert sorted(row % 6 for row, _ in answers["phrase edema"]) == list(range(6))
    assert sorted(row % 6 for row, _ in answers["row 4"]) == [0, 1, 2, 3, 5]  # not their own others


def test_reports_are_searched_where_they_were_embedded(tmp_path, capsys):
    folder = embedded(tmp_path, "--split", "all", "data.empty_report=image_only")
    assert run(tmp_path, "--row", "3", "--among", "report", "--top", "4") == 0
    vectors = {
        name: np.concatenate([v for _, v in Archive(folder).parts(name)])
        for name in ("image", "report")
    }
    scores = vectors["report"].astype(np.float64) @ vectors["image"][3].astype(np.float64)
    scores[3] = -np.inf  # its own report is no answer
    assert [row for row, _ in found(tmp_path)["row 3"]] == ranked(scores)[:4]
    assert "searched the reports of 30 rows" in capsys.readouterr().out


def test_a_film_that_is_gone_keeps_its_place_and_has_a_reason(tmp_path, capsys):
    root = Path(shutil.copytree(pictures(), tmp_path / "films"))
    embedded(tmp_path, "--images")
    run(tmp_path, "--finding", "Edema", "--top", "30")
    first = found(tmp_path)["finding Edema"][0][0]
    (root / f"{first}.png").write_bytes(b"")
    capsys.readouterr()
    page = tmp_path / "p.html"
    asked = ["--finding", "Edema", "--top", "30", "--rerank", "30", "--page", str(page)]
    assert run(tmp_path, *asked, root=root) == 0
    assert "; 1 cannot be read (" in capsys.readouterr().out
    assert str(found(tmp_path)["finding Edema"][-1]) == f"({first}, nan)"
    text = page.read_text()
    assert text.count('class="unread"') == 1 and f"30. row {first}</p>" in text
    # nothing but the page reads films here: its line says what it lacks
    assert run(tmp_path, "--row", "3", "--top", "30", "--page", str(page), root=root) == 0
    said = capsys.readouterr().out.splitlines()
    assert "cannot be read" not in said[0] and f"{page}; 1 cannot be read (" in said[-2]


def test_a_page_that_finds_no_room_is_named_and_not_the_table_that_was_written(
    tmp_path, capsys, monkeypatch
):
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    embedded(tmp_path, "--images")
    page = tmp_path / "p.html"
    assert run(tmp_path, "--row", "4", "--page", str(page)) == 0
    monkeypatch.setattr(search_page, "render_page", full)
    assert run(tmp_path, "--row", "3", "--page", str(page)) == 2
    assert f"mlip search: {page} cannot be written: No space" in capsys.readouterr().err
    assert len(found(tmp_path)["row 3"]) == 20 and not list(tmp_path.glob("*p.html*"))


def test_where_no_film_can_be_read_table_and_page_stay_as_they_were(tmp_path, capsys):
    """The table was replaced and the page was not: pictures of other answers."""
    embedded(tmp_path, "--images")
    page = tmp_path / "p.html"
    assert run(tmp_path, "--row", "4", "--page", str(page)) == 0
    before = [file.read_bytes() for file in (page, tmp_path / "found.csv")]
    assert run(tmp_path, "--row", "3", "--page", str(page), root=tmp_path) == 3
    assert "can be read (missing" in capsys.readouterr().err
    assert [file.read_bytes() for file in (page, tmp_path / "found.csv")] == before


def test_a_page_without_an_answer_says_so(tmp_path, capsys):
    same: dict[str, Any] = {"patient_id": "PATIENT-SECRET", "split": ""}
    embedded(tmp_path, "--images", **same)
    page = tmp_path / "p.html"
    assert run(tmp_path, "--row", "3", "--per-patient", "--page", str(page), **same) == 0
    assert "row 3: no answer" in capsys.readouterr().out
    assert page.read_text().count("no answer") == 1


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        ([], 2, "nothing is asked: expected --phrase, --finding, --wordings, --image or --row"),
        (["--phrase", "edema", "--top", "0"], 2, "--top 0: expected 1 or more"),
        (["--row", "1", "--rerank", "50"], 2, "--rerank scores images by words"),
        (["--phrase", "a", "--rerank", "5"], 2, "--rerank 5: expected at least --top 20"),
        (["--row", "31"], 3, "row 31 has no embedding in"),
        (["--finding", "nonsense"], 4, "the lexicon knows no finding called 'nonsense'"),
        (["--phrase", "edema", "--among", "report"], 3, "holds images alone"),
        (["--image", "nowhere.png"], 3, "nowhere.png"),
        (["--phrase", "edema", "--page", ""], 2, "--page is empty"),
        (["--phrase", "=1+1"], 4, "a spreadsheet would run it as a formula"),
        (["--phrase", "a\nb"], 4, "expected words in one line"),
        (["--phrase", "a\n"], 4, "'a\\n': expected words in one line"),
        (["--phrase", ""], 2, "the phrase '' is empty"),
        (["--phrase", "edema", "--phrase", "edema " * 99], 2, "phrase 2 has"),
        (["--phrase", "a", "--phrase", "a"], 4, "phrase 'a' is asked twice"),
        (["--row", "2", "--row", "2"], 4, "row '2' is asked twice"),
        (["--row", "1", "--out", "x.html", "--page", "./x.html"], 2, "is --out too, which it"),
    ],
)
def test_what_cannot_be_asked_is_one_line(tmp_path, capsys, options, code, told):
    embedded(tmp_path, "--images")
    capsys.readouterr()
    assert run(tmp_path, *options) == code
    said = capsys.readouterr().err
    assert told in said and said.startswith("mlip search: ") and said.count("\n") == 1
    assert not (tmp_path / "found.csv").exists()


def test_findings_are_asked_in_words_of_ones_own_and_none_by_a_formula(tmp_path, capsys):
    embedded(tmp_path, "--images")
    words = tmp_path / "words.yaml"
    for name, code in (("wet lungs", 0), ("=1+1", 4)):
        words.write_text(f"{name}: {{positive: [There is edema.], negative: [No edema.]}}\n")
        capsys.readouterr()
        assert run(tmp_path, "--wordings", str(words)) == code
        assert found(tmp_path).keys() == {"finding wet lungs"}
    assert "'=1+1': a spreadsheet would run it as a formula" in capsys.readouterr().err


def test_another_model_or_other_rows_give_no_answers(tmp_path, capsys):
    folder = embedded(tmp_path, "--images")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "weights": "0" * 64}))
    assert run(tmp_path, "--phrase", "edema") == 3
    assert "was made with other weights than this model's" in capsys.readouterr().err
    assert run(tmp_path, "--row", "1") == 0  # asks no model
    (folder / "index.json").write_text(json.dumps({**index, "preprocessing": "0" * 64}))
    assert run(tmp_path, "--phrase", "edema") == 3
    assert "was made with other preprocessing than this model's" in capsys.readouterr().err
    (folder / "index.json").write_text(json.dumps(index))
    assert run(tmp_path, "--phrase", "edema", "--per-patient", report="other") == 3
    assert "was made of another manifest than" in capsys.readouterr().err


def test_pictures_are_of_the_column_of_images_that_was_embedded(tmp_path, capsys):
    lateral: dict[str, Any] = {"lateral": lambda i: f"{29 - i}.png"}
    folder = embedded(tmp_path, "--images", **lateral)
    asked = ["--row", "1", "--page", str(tmp_path / "p.html"), "data.columns.image=lateral"]
    assert run(tmp_path, *asked, **lateral) == 3
    told = "of the images of column 'image', not of data.columns.image=lateral: name that column"
    assert told in capsys.readouterr().err
    assert run(tmp_path, *asked[:-1], **lateral) == 0
    index = json.loads((folder / "index.json").read_text())
    del index["columns"]  # an earlier version did not tell
    (folder / "index.json").write_text(json.dumps(index))
    assert run(tmp_path, *asked, **lateral) == 0


def test_the_page_of_evaluation_says_how(tmp_path, monkeypatch):
    """Its block runs as it is printed, on an archive of that name."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "evaluation.md").read_text()
    block = page.split("## An archive of films")[1].split("```python\n")[1].split("```")[0]
    embedded(tmp_path, "--images").rename(tmp_path / "archive")
    images = open_checkpoint(small_export()).encode_images([pictures() / "5.png"])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"images": images}
    exec(block, names)
    (hits,) = names["hits"]
    assert hits.row_index[0] == 5 and len(hits) == 20


def test_files_of_other_kinds_are_not_replaced(tmp_path, capsys):
    embedded(tmp_path, "--images")
    for option, name in (("--out", "manifest.csv"), ("--page", "manifest.csv")):
        before = (tmp_path / name).read_bytes()
        assert run(tmp_path, "--phrase", "edema", option, str(tmp_path / name)) == 2
        assert f"{option} {tmp_path / name}: is there already" in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == before
    page = ["--page", str(tmp_path / "found.html")]
    assert [run(tmp_path, "--phrase", "edema", *page) for _ in range(2)] == [0, 0]

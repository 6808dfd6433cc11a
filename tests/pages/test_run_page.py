"""The page stands alone, says what the results say, and keeps real patients' text to itself."""

from __future__ import annotations

import copy
import json
import re
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlip.pages import tables
from mlip.pages.charts import Mark, line_chart, powers_of_ten, scale_marks
from mlip.pages.corpus import ledger_context
from mlip.pages.pictures import decode_png, heat_uri
from mlip.pages.run_page import render, write_report
from mlip.pages.training import MOST_ROWS, held_out_charts, read_log, training_charts
from mlip.transfer.alignment.examples import collect_examples
from mlip.transfer.measures.operating_point import MEANT
from mlip.transfer.png_text import png_text
from mlip.transfer.summary import summary_lines
from tests.small_run import small_results, small_run

LEDGER = {
    "rows": 64,
    "excluded": {"other_split_test": 32},
    "quarantined_rows": {"truncated": 2},
    "epochs": {"0": {"trained": 30, "quarantined": {"truncated": 2}}},
}


def write_log(folder: Path) -> None:
    lines = [
        json.dumps(
            {
                "step": step,
                "total": 9.0 / step,
                "terms": {"global_contrastive": 4.0 / step, "matching": None},
                "lr": 1e-4,
                "pairs_per_s": 100.0,
            }
        )
        for step in range(1, 30)
    ]
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 30, "tot')


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    write_log(folder)
    (folder / "ledger.json").write_text(json.dumps(LEDGER))
    return write_report(folder, small_results()).read_text()


def test_a_score_that_is_not_there_is_called_not_measured() -> None:
    page = render(Path("none"), {"run": {"name": "empty"}, "config": {}})
    assert page.count('<div class="value none">not measured</div>') == 4
    assert "<title>empty - MLIP report</title>" in page


def test_rows_that_no_step_reached_are_not_called_trained() -> None:
    """A run that ends before its first epoch does: of 1,000 rows, 990 were said to be trained."""
    ledger = {
        "rows": 1000,
        "excluded": {"no_report": 6},
        "quarantined_rows": {"truncated": 4},
        "epochs": {"0": {"trained": 97, "quarantined": {"truncated": 3}, "ahead": 894}},
    }
    context = ledger_context(ledger)
    assert context is not None
    counts = {part["name"]: part["count"] for part in context["parts"]}
    assert counts == {
        "Trained": 97,
        "Not reached yet": 893,
        "Quarantined: truncated": 4,
        "Excluded: no report": 6,
    }
    assert "not reached" in context["sentence"]
    assert "not reached" not in (ledger_context(LEDGER) or {})["sentence"]


def test_the_page_says_how_many_images_could_not_be_read(tmp_path: Path, page: str) -> None:
    """Scores of what was left of a half-mounted folder stood there as those of the split."""
    assert "could not be read" not in page
    results = copy.deepcopy(small_results())
    images = results["data"]["images"]
    results["data"]["rows_asked"] = images + 40
    text = write_report(tmp_path, results).read_text()
    assert f"{images} of {images + 40} " in text and "40 could not be read" in text


def test_a_score_without_an_interval_says_why(tmp_path: Path, page: str) -> None:
    results = copy.deepcopy(small_results())
    row = results["grounding"]["keyword"]["all"]
    bare = {"value": 9.0, "low": None, "high": None, "n": 30, "reason": "hit too rarely"}
    row["over_swapped"] = bare
    text = write_report(tmp_path, results).read_text()
    assert '<span class="ci why">no interval: hit too rarely</span>' in text
    assert "no interval: hit too rarely; no better 1.0" in text


def test_a_mean_over_some_findings_says_over_how_many(tmp_path: Path, page: str) -> None:
    """A mean over the findings that happen to be scored stood there as that over all of them."""
    results = copy.deepcopy(small_results())
    asked = len(results["zero_shot"]["findings"])
    means = [results["zero_shot"]["macro"]["global"]]
    if told := results["zero_shot"].get("at_thresholds", {}).get("macro"):
        means.append(told["combined"]["f1"])
    for mean in means:
        assert mean["classes_asked"] == asked
        mean["classes"] = asked - 2
    text = write_report(tmp_path, results).read_text()
    assert text.count(f"over {asked - 2} of {asked} findings") == 1 + len(means)
    assert f"over {asked - 2} of {asked} findings" in "\n".join(summary_lines(results))
    assert not re.search(rf"over \d+ of {asked} findings", page)


def test_rates_whose_means_are_over_other_findings_say_so_one_by_one() -> None:
    """A finding that every row carries has a sensitivity and no specificity."""
    told: dict[str, Any] = {"rule": "f1", "findings": {}}
    for counts, expected in (
        ((3, 3, 3), ""),
        ((2, 2, 2), "over 2 of 3 findings"),
        ((3, 3, 2), "specificity over 2 of 3 findings"),
        ((2, 2, 1), "f1 over 2 of 3 findings; sensitivity over 2 of 3 findings; "
                    "specificity over 1 of 3 findings"),
    ):  # fmt: skip
        means = {n: {"classes": c, "classes_asked": 3} for n, c in zip(MEANT, counts, strict=True)}
        found = {"findings": [], "at_thresholds": {**told, "macro": {"combined": means}}}
        context = tables._threshold_context(found)
        assert context is not None and context["over"] == expected


class _Outline(HTMLParser):
    VOID = {"meta", "img", "br", "link", "hr", "input"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        named = dict(attrs)
        if tag == "section":
            self.sections.append(named["id"])
        self.loads += [named[k] for k in ("src", "href") if k in named]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"


def outline(page: str) -> _Outline:
    parser = _Outline()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_the_page_is_whole_and_loads_nothing(page: str) -> None:
    found = outline(page)
    assert all(load.startswith(("data:image/", "#")) for load in found.loads)
    assert "<script" not in page and "@import" not in page and "url(" not in page
    assert len(page) < 6_000_000


def test_every_section_is_there_and_in_the_navigation(page: str) -> None:
    wanted = [
        "zero-shot",
        "retrieval",
        "grounding",
        "maps",
        "examples",
        "training",
        "ledger",
        "knowledge",
        "settings",
        "provenance",
    ]
    found = outline(page)
    assert found.sections == wanted
    assert [load for load in found.loads if load.startswith("#")] == [f"#{w}" for w in wanted]


def test_the_numbers_on_the_page_are_those_of_the_results(page: str) -> None:
    results = small_results()
    text = re.sub(r"<[^>]+>", " ", page)
    for row in results["zero_shot"]["findings"]:
        assert row["name"] in text
        assert f"{row['positives']} of {row['n']}" in text
        assert f"{row['local']['value']:.2f}" in text
    oracle = results["retrieval"]["oracle"]["image_to_text"]["recall@10"]["value"]
    assert f"{oracle:.2f}" in text and "Oracle" in text
    assert results["fingerprints"]["weights"] in text
    assert "Not for clinical use" in text
    assert "64 rows in the manifest" in text


def test_a_log_cut_off_by_a_kill_still_gives_its_curves(tmp_path: Path) -> None:
    write_log(tmp_path)
    log = read_log(tmp_path / "log.jsonl")
    assert [row["step"] for row in log] == list(range(1, 30))
    groups = {
        group["title"]: [c["title"] for c in group["charts"]] for group in training_charts(log)
    }
    assert groups == {
        "Loss": ["Total loss", "Global contrastive"],
        "Optimisation": ["Learning rate"],
        "Machine": ["Pairs per second"],
    }


def test_what_val_showed_is_its_scores_under_the_step_that_is_the_best(tmp_path: Path) -> None:
    looks = [
        {"step": 5, "total": 3.0, "local_alignment": 1.0, "pairs": 8, "best_step": 5, "time": 1.0},
        {"step": 10, "total": 2.0, "local_alignment": 0.5, "pairs": 8, "best_step": 10, "time": 2},
    ]
    cut = json.dumps(looks[1])[:-30]  # by a kill; the run that went on looked again
    lines = [json.dumps(looks[0]), cut, json.dumps(looks[1])]
    (tmp_path / "validation.jsonl").write_text("\n".join(lines))
    (group,) = held_out_charts(read_log(tmp_path / "validation.jsonl"))
    assert group["title"] == "On val, at each checkpoint (the best: that of step 10)"
    assert [(c["title"], c["last"]) for c in group["charts"]] == [
        ("Contrastive loss", "2"),
        ("Token-knowledge-patch", "0.5"),
    ]
    log = [{"step": step, "total": 2.0, "lr": 0.1, "memory_gib": 1.0} for step in (5, 10)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    text = write_report(tmp_path, small_results()).read_text()
    titles = re.findall("<h3>(Loss|On val|Optimisation|Machine)", text)
    assert titles == ["Loss", "On val", "Optimisation", "Machine"]  # beside the losses


def test_a_resumed_runs_later_line_holds(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "total": 5}\n{"step": 1, "total": 4}\n')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1.0, "total": 4.0}]


def test_a_run_begun_anew_in_the_same_folder_shows_nothing_of_the_earlier_one(
    tmp_path: Path,
) -> None:
    steps = [*range(1, 31), *range(21, 26), *range(1, 6), 7]
    lines = [json.dumps({"step": step, "total": float(i)}) for i, step in enumerate(steps)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    log = read_log(tmp_path / "log.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 7]
    assert [row["total"] for row in log] == [35, 36, 37, 38, 39, 40]


def test_of_a_long_log_evenly_spaced_rows_are_kept_and_not_all(tmp_path: Path) -> None:
    steps = [*range(1, 15_001), *range(12_001, 20_001)]  # went on from a checkpoint at 12,000
    lines = [json.dumps({"step": step, "total": float(i)}) for i, step in enumerate(steps)]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(lines))
    tracemalloc.start()
    log = read_log(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [row["step"] for row in log] == list(range(8, 20_001, 8))
    assert len(log) <= MOST_ROWS
    assert [row["total"] for row in log if row["step"] > 12_000][0] == 15_007
    assert peak < 3e6  # of 20,000 rows 9e6, the text among it


@pytest.mark.parametrize(
    "damaged", [b"", b"3", b"[1]", b'{"rows": 3, "epochs": []}', b"\xff", b"[" * 100_000]
)
def test_a_damaged_ledger_or_log_costs_its_section_and_not_the_page(
    tmp_path: Path, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "ledger.json").write_bytes(damaged)
    (tmp_path / "log.jsonl").write_bytes(damaged)
    page = write_report(tmp_path, small_results()).read_text()
    assert 'id="ledger"' not in page and 'id="training"' not in page
    assert "ledger.json: is no ledger of a run" in caplog.text


def test_a_log_that_may_not_be_read_costs_its_curves_and_not_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> list[dict[str, float]]:  # root may read every file
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("mlip.pages.run_page.read_log", refuse)
    assert 'id="training"' not in write_report(tmp_path, small_results()).read_text()
    assert "log.jsonl: cannot be read, the page goes without: Permission" in caplog.text


def test_real_data_shows_neither_text_nor_names_of_files(tmp_path: Path) -> None:
    """The same run taken for real data: no report, no word maps, hashed studies."""
    run, results = small_run(), copy.deepcopy(small_results())
    pictures = results["examples"]
    texts = [run.manifest.text(row) for row in run.manifest.rows("test").tolist()]
    names = [Path(run.manifest.image_path(r)).stem for r in run.manifest.rows("test").tolist()]
    shown = json.dumps(pictures)
    assert any(text in shown for text in texts) and any(name in shown for name in names)
    results["examples"] = _examples_of_real_data()
    results["data"]["is_phantom"] = False
    page = write_report(tmp_path, results).read_text()
    for hidden in (*texts, *names):
        assert hidden not in page
    assert "Report text is not shown for real data" in page


def _examples_of_real_data() -> dict:
    from mlip.transfer.alignment.chosen_rows import choose_rows
    from mlip.transfer.alignment.encoded_split import encode_split

    run = small_run()
    split = encode_split(run, run.manifest, choose_rows(run.config, run.manifest))
    return collect_examples(
        *(run, run.manifest, split),
        queries=[],
        phrases=[],
        maps=None,
        boxes={},
        names={},
        is_phantom=False,
    )


def test_tasks_that_could_not_run_leave_their_sections_out(tmp_path: Path) -> None:
    results = {
        **small_results(),
        "zero_shot": {"reason": "no labels"},
        "grounding": {"reason": "no boxes"},
        "examples": {},
    }
    sections = outline(write_report(tmp_path, results).read_text()).sections
    assert "zero-shot" not in sections and "grounding" not in sections
    assert "retrieval" in sections and "provenance" in sections


def test_what_no_finding_and_no_pool_can_tell_is_not_told(tmp_path: Path) -> None:
    """ "Worst finding: global head - (None)", "in 100 % of cases" of the first 10 of 4."""
    results = copy.deepcopy(small_results())
    none = {"value": None, "low": None, "high": None, "n": 0, "reason": "no finding has both"}
    for name in ("macro", "worst"):
        extra = {"finding": None} if name == "worst" else {}
        results["zero_shot"][name] = {h: none | extra for h in results["zero_shot"][name]}
    results["retrieval"] |= {"pool": 4, "chance": {"recall@10": 1.0}}
    text = write_report(tmp_path, results).read_text()
    assert "Worst finding" not in text and "(None)" not in text and "Combined adds" in text
    assert "finds the right report" not in text and "among the first 10 of 4" in text
    results["retrieval"] = {"pool": 0, "pools": 0, "n": 0, "left_out": 1, "scores": {}}
    assert "among the first 10 of" not in write_report(tmp_path, results).read_text()


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    results = copy.deepcopy(small_results())
    results["run"]["name"] = "<script>alert(1)</script>"
    page = write_report(tmp_path, results).read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_other_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluate_run returns.*\['a'\]"):
        write_report(tmp_path, {"a": 1})


def test_marks_stand_where_their_values_are() -> None:
    drawn = str(scale_marks([[Mark(0.75)]], low=0.5, high=1.0, width=214))
    assert 'cx="107.0"' in drawn  # the middle
    assert "<circle" not in str(scale_marks([[Mark(None)]], low=0.0, high=1.0))


def test_small_numbers_on_an_axis_fit_its_margin() -> None:
    # by hand; format's 5.0e-04 was cut off at the left of a chart
    shown = [powers_of_ten(x) for x in (5e-4, 2.5e-4, -1e-12)]
    assert shown == ["5e-4", "2.5e-4", "-1e-12"]
    drawn = str(line_chart([1, 2], [2e-4, 8.1e-4]))
    assert ">2.5e-4<" in drawn and "e-0" not in drawn


def test_a_constant_curve_is_a_flat_line_and_nan_is_left_out() -> None:
    drawn = str(line_chart([1, 2, 3, 4], [1.4, 1.4 + 1e-9, float("nan"), 1.4]))
    points = re.findall(r'points="([^"]+)"', drawn)[-1].split()
    assert len(points) == 3
    assert len({point.split(",")[1] for point in points}) == 1


def test_a_picture_survives_and_cold_parts_of_a_map_leave_it_as_it_is() -> None:
    import base64

    import cv2

    image = np.random.default_rng(0).integers(60, 200, (288, 288)).astype(np.uint8)
    image = cv2.GaussianBlur(image, (0, 0), 4)
    np.testing.assert_array_equal(decode_png(png_text(image)), image)
    heat = np.zeros((4, 4))
    heat[0, 0] = 1.0
    data = base64.b64decode(heat_uri(image, heat, 0.0, 1.0).split(",")[1])
    shown = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).astype(int)
    cold = shown[200:, 200:]
    assert np.abs(cold - image[200:, 200:, None]).mean() < 4  # JPEG's own error
    hot = shown[20:50, 20:50]
    assert (hot.max(axis=2) - hot.min(axis=2)).mean() > 60  # coloured

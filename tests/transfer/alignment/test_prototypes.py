"""Prototypes against categories, and pairs that are no negatives, counted on made-up cases."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mlip.batch import ABSENT, PRESENT
from mlip.dataloading.reports.column import TextStore
from mlip.knowledge.categories import prototype_alignment
from mlip.knowledge.concepts import Concept, ConceptTable
from mlip.pages.corpus import knowledge_context
from mlip.transfer.alignment.prototypes import prototype_statistics
from mlip.transfer.alignment.statistics import knowledge_statistics, pair_statistics
from tests.small_run import small_results, small_run

TABLE = ConceptTable(
    [
        Concept(id="fluid", name="fluid", category="pleura"),
        Concept(id="spot", name="spot", category="lung"),
        Concept(id="wire", name="wire", category="device"),
        Concept(id="apex", name="apex", category="lung", semantic_type="anatomy"),
        Concept(id="umls:c1", name="secret name", category="lung", source="umls"),
    ]
)


def reports_of(categories: list[int]) -> np.ndarray:
    """Mentions: each report asserts one finding, mentions the apex, and denies another finding."""
    rows = []
    for report, row in enumerate(categories):
        rows += [(row, PRESENT, report), (3, PRESENT, report), ((row + 1) % 3, ABSENT, report)]
    return np.array(rows)


def test_prototypes_of_one_category_each_are_pure_and_shuffled_ones_are_chance() -> None:
    categories = [0, 1, 2] * 40
    prototypes = torch.eye(3, 8) * 2.0  # of any length
    usable = np.ones(120, dtype=bool)
    shuffled = np.random.default_rng(1).permutation(categories)
    found = prototype_statistics(
        prototypes,
        {
            "image": (prototypes[categories], usable),
            "report": (prototypes[torch.as_tensor(shuffled)], usable),
        },
        reports_of(categories),
        120,
        TABLE,
        seed=1,
    )
    assert found["categories"] == {"pleura": 40, "lung": 40, "device": 40}
    image, report = found["views"]["image"], found["views"]["report"]
    assert image["purity"]["value"] == 1.0 and image["nmi"]["value"] == pytest.approx(1.0)
    assert image["prototypes_used"] == 3
    for score in ("purity", "nmi"):
        assert image[f"{score}_chance"] < 0.5
        assert abs(report[score]["value"] - report[f"{score}_chance"]) < 0.1
    # three equal classes by chance: a third of the reports and no information
    assert report["purity"]["value"] > 0.3 > 0.1 > report["nmi"]["value"]


def test_prototypes_have_no_interval_as_a_report_drawn_twice_agrees_with_itself() -> None:
    # oracle: 200 reports on 100 prototypes by chance; resamples of reports line up better than all
    generator = np.random.default_rng(3)
    nearest, category = generator.integers(0, 100, 200), generator.integers(0, 3, 200)
    prototypes = torch.eye(100)
    views = {"image": (prototypes[torch.as_tensor(nearest)], np.ones(200, dtype=bool))}
    mentions = reports_of(category.tolist())
    whole = prototype_statistics(prototypes, views, mentions, 200, TABLE, seed=1)
    found = whole["views"]["image"]
    resampled = []
    for _ in range(40):
        drawn = torch.as_tensor(generator.integers(0, 200, 200))
        again = prototype_alignment(
            torch.as_tensor(nearest)[drawn], torch.as_tensor(category)[drawn]
        )
        resampled.append((again["purity"], again["nmi"]))
    for score, draws in zip(("purity", "nmi"), np.array(resampled).T, strict=True):
        assert found[score]["value"] < draws.min()
        assert found[score]["low"] is None and found[score]["high"] is None
        assert "drawn twice" in found[score]["reason"]
    knowledge = knowledge_statistics(mentions, 200, TABLE, None, (), 2)
    page = knowledge_context({"knowledge": knowledge, "prototypes": whole})
    assert page is not None and "No interval: a report drawn twice" in page["prototype_sentence"]


def test_reports_without_a_present_finding_and_unusable_rows_are_left_out() -> None:
    mentions = np.array([(0, PRESENT, 0), (1, ABSENT, 1), (3, PRESENT, 2), (1, PRESENT, 3)])
    usable = np.array([True, True, True, False])
    views = {"image": (torch.eye(4), usable)}
    found = prototype_statistics(torch.eye(4), views, mentions, 4, TABLE, seed=1)
    assert found["reports"] == 2 and found["views"]["image"]["purity"]["n"] == 1


def test_a_checkpoint_without_prototypes_says_so_on_the_page() -> None:
    found = prototype_statistics(None, {}, np.zeros((0, 3), int), 0, TABLE, seed=1)
    assert "no prototypes" in found["reason"]
    knowledge = knowledge_statistics(np.zeros((0, 3), int), 0, TABLE, None, (), 2)
    page = knowledge_context({"knowledge": knowledge, "prototypes": found})
    assert page is not None and "no prototypes" in page["prototype_sentence"]


def test_a_licensed_name_stays_out_of_the_results_and_silent_reports_are_counted() -> None:
    mentions = np.array([(4, PRESENT, 0), (0, ABSENT, 0)])
    found = knowledge_statistics(mentions, 3, TABLE, None, (), 2)
    assert [entry["name"] for entry in found["top"]] == ["fluid", "umls:c1"]
    assert ("reports without a mention", "2") in found["facts"]
    assert dict(found["facts"])["reports that fill data.max_entities (2)"] == "1"


def test_pairs_that_are_no_negatives_are_counted_by_hand() -> None:
    run = small_run()
    rows = run.manifest.rows("train")
    pair_id = np.arange(len(run.manifest))
    pair_id[rows[:3]] = rows[0]  # one group of three, one of two
    pair_id[rows[5:7]] = rows[5]
    manifest = dataclasses.replace(run.manifest, pair_id=pair_id)
    found = pair_statistics(run.config, manifest, run.tokenizer, run.linker, run.table)
    text = found["by_text_or_study"]
    assert (text["groups"], text["pairs_in_groups"], text["largest"]) == (2, 5, 3)
    total = len(rows)
    assert text["left_out_of_batch"] == pytest.approx((6 + 2) / (total * (total - 1)))
    assert found["by_concepts"] is None
    knowledge = dataclasses.replace(run.config.knowledge, pair_id_by_concepts=True)
    config = dataclasses.replace(run.config, knowledge=knowledge)
    joined = pair_statistics(config, manifest, run.tokenizer, run.linker, run.table)
    before = joined["by_concepts"]["pairs_in_groups"]
    texts = list(run.manifest.report)
    texts[rows[10]], texts[rows[11]] = "Pneumoperitoneum is seen.", "There is pneumoperitoneum."
    manifest = dataclasses.replace(manifest, report=TextStore.of(texts))
    joined = pair_statistics(config, manifest, run.tokenizer, run.linker, run.table)
    assert joined["by_text_or_study"] == text
    assert joined["by_concepts"]["pairs_in_groups"] == before + 2


def test_a_report_in_another_language_is_counted() -> None:
    linker = small_run().linker
    texts = ["No pleural effusion.", "Kein Pleuraerguss, Herz nicht vergroessert.", ""]
    found = knowledge_statistics(np.zeros((0, 3), int), 3, small_run().table, linker, texts, 8)
    assert ("reports of few known words", "1") in found["facts"]


def test_a_run_counts_its_pairs_and_shows_them() -> None:
    page = knowledge_context(small_results())
    assert page is not None and "training pairs" in page["pair_sentence"]
    assert "no negatives" in page["pair_sentence"]

"""Categories, the k-means start of the prototypes and their alignment."""

import pytest
import torch

from mlip.knowledge.categories import (
    category_index,
    prototype_alignment,
    prototype_init,
    report_category,
)
from mlip.knowledge.concept_files import load_concepts


def clusters(per_category: int, spread: float = 0.05) -> tuple[torch.Tensor, torch.Tensor]:
    """Three tight groups of directions, one a category."""
    generator = torch.Generator().manual_seed(1)
    axes = torch.eye(3, 8)
    points = axes.repeat_interleave(per_category, 0)
    return (
        points + spread * torch.randn(points.shape, generator=generator),
        torch.arange(3).repeat_interleave(per_category),
    )


def test_every_concept_has_the_category_its_file_gives_it():
    table = load_concepts(None)
    index = category_index(table)
    assert index.dtype == torch.int64 and index.shape == (len(table),)
    for concept_id, category in (("pneumothorax", "pleura"), ("pacemaker", "device")):
        assert table.categories[int(index[table.index[concept_id]])] == category


def test_a_report_falls_in_the_category_of_most_of_its_findings():
    categories = torch.tensor([0, 0, 1, 1, 2])
    findings = torch.tensor([True, True, True, True, False])
    assert report_category([2, 3, 0, 4], categories, findings) == 1
    assert report_category([0, 2], categories, findings) == 0  # a tie goes to the first
    assert report_category([4], categories, findings) == -1


def test_prototypes_are_unit_rows_that_sit_in_their_category():
    points, labels = clusters(100)
    prototypes = prototype_init(points, labels, 12, seed=1)
    assert prototypes.shape == (12, 8)
    assert torch.allclose(prototypes.norm(dim=1), torch.ones(12), atol=1e-5)
    assert prototypes[:, :3].argmax(1).tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_prototypes_repeat_with_the_seed_and_differ_without():
    points, labels = clusters(50, spread=0.3)
    assert torch.equal(prototype_init(points, labels, 9, 1), prototype_init(points, labels, 9, 1))
    assert not torch.equal(
        prototype_init(points, labels, 9, 1), prototype_init(points, labels, 9, 2)
    )


def test_kmeans_recovers_known_clusters_inside_one_category():
    points, _ = clusters(60, spread=0.02)
    prototypes = prototype_init(points, torch.zeros(180, dtype=torch.int64), 3, seed=3)
    assert sorted(prototypes[:, :3].argmax(1).tolist()) == [0, 1, 2]
    assert float((prototypes @ torch.eye(3, 8).T).max(1).values.min()) > 0.99


def test_large_categories_get_more_prototypes_and_small_ones_at_least_one():
    points, _ = clusters(100)
    labels = torch.tensor([0] * 280 + [1] * 18 + [2] * 2)
    counts = prototype_init(points, labels, 30, seed=1)
    assert counts.shape == (30, 8)
    # 2 rows of category 2 cannot make more than two prototypes; nothing is repeated
    assert len(torch.unique(counts.round(decimals=5), dim=0)) == 30


def test_fewer_prototypes_than_categories_serve_the_largest():
    points, _ = clusters(100)
    labels = torch.tensor([0] * 100 + [1] * 150 + [2] * 50)
    prototypes = prototype_init(points, labels, 2, seed=1)
    assert prototypes.shape == (2, 8)


def test_zero_rows_and_empty_corpora_still_give_unit_prototypes():
    for points in (torch.zeros(5, 4), torch.zeros(0, 4), torch.ones(3, 4)):
        prototypes = prototype_init(points, torch.zeros(len(points), dtype=torch.int64), 6, 1)
        assert prototypes.shape == (6, 4)
        assert torch.allclose(prototypes.norm(dim=1), torch.ones(6), atol=1e-5)


def test_shapes_that_do_not_agree_are_named():
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(2,\)"):
        prototype_init(torch.ones(3, 4), torch.zeros(2), 2, 1)
    with pytest.raises(ValueError, match="1 or more"):
        prototype_init(torch.ones(3, 4), torch.zeros(3), 0, 1)


def test_alignment_is_one_for_a_perfect_match_and_near_zero_for_chance():
    categories = torch.arange(4).repeat(250)
    perfect = prototype_alignment(categories * 2, categories)
    assert perfect["purity"] == 1.0 and perfect["nmi"] == pytest.approx(1.0)
    generator = torch.Generator().manual_seed(1)
    chance = prototype_alignment(torch.randint(0, 4, (1000,), generator=generator), categories)
    assert chance["nmi"] < 0.02 and chance["purity"] < 0.35
    # by hand: prototype 0 holds a, a, b; prototype 1 holds b -> 3 of 4 in their majority
    by_hand = prototype_alignment(torch.tensor([0, 0, 0, 1]), torch.tensor([5, 5, 6, 6]))
    assert by_hand["purity"] == 0.75 and by_hand["prototypes_used"] == 2.0
    assert prototype_alignment(torch.zeros(0), torch.zeros(0))["samples"] == 0.0

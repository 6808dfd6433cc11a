"""Categories of concepts, the start of the prototypes, and how prototypes line up with them."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from mlip.knowledge.concepts import ConceptTable

_ITERATIONS = 25  # spherical k-means settles in 10 to 15 on some thousand report vectors


def category_index(table: ConceptTable) -> Tensor:
    """The category of every concept as a row of `table.categories`.

    Returns: int64 [E]
    """
    row = {name: i for i, name in enumerate(table.categories)}
    return torch.tensor([row[concept.category] for concept in table], dtype=torch.int64)


def report_category(present_ids: list[int], categories: Tensor, findings: Tensor) -> int:
    """The category most of a report's present concepts fall in; ties to the first; -1 if none.

    Shapes:  categories, findings [E]; findings True where a concept counts (all but anatomy:
             normal statements and words of change have categories of their own)
    """
    counts = Counter(int(categories[i]) for i in present_ids if bool(findings[i]))
    return min(counts, key=lambda c: (-counts[c], c)) if counts else -1


def prototype_init(
    vectors_ND: Tensor, categories_N: Tensor, num_prototypes: int, seed: int
) -> Tensor:
    """Unit prototypes from spherical k-means run inside each category.

    Zero rows are left out. Categories share the prototypes by their number of rows (largest
    remainder, at least one each while there are enough); where a category has fewer distinct
    rows than its share, or none are left at all, the remaining prototypes are random directions.

    Shapes:  vectors_ND [N, D]; categories_N [N] int64, -1 = a group of its own
    Returns: [num_prototypes, D] float32, rows of unit length, grouped by category
    Raises:  ValueError on shapes that do not agree or fewer than one prototype
    Source:  ours (spherical k-means: Dhillon and Modha 2001)
    """
    if vectors_ND.ndim != 2 or categories_N.shape != vectors_ND.shape[:1]:
        raise ValueError(
            f"expected vectors [N, D] and categories [N], got {tuple(vectors_ND.shape)} and "
            f"{tuple(categories_N.shape)}"
        )
    if num_prototypes < 1:
        raise ValueError(f"num_prototypes: expected 1 or more, got {num_prototypes}")
    generator = torch.Generator().manual_seed(seed)
    points = vectors_ND.detach().to("cpu", torch.float32)
    norms = points.norm(dim=1)
    kept = norms > 1e-6
    points, labels = points[kept] / norms[kept, None], categories_N.cpu()[kept]
    centres = []
    for label, count in _shares(labels, num_prototypes).items():
        members = torch.unique(points[labels == label], dim=0)
        centres.append(_spherical_kmeans(members, min(count, len(members)), generator))
    found = torch.cat(centres) if centres else points.new_zeros(0, vectors_ND.shape[1])
    missing = num_prototypes - len(found)
    random = torch.randn(missing, vectors_ND.shape[1], generator=generator)
    return torch.cat([found, random / random.norm(dim=1, keepdim=True)])


def prototype_alignment(assigned_N: Tensor, categories_N: Tensor) -> dict[str, float]:
    """How well prototypes line up with categories.

    Shapes:  assigned_N [N] prototype of each sample; categories_N [N]
    Returns: purity (share of samples in the majority category of their prototype), normalised
             mutual information (arithmetic mean, 0 to 1), prototypes_used, samples
    Source:  Strehl and Ghosh 2002 for the normalised mutual information
    """
    from sklearn.metrics import normalized_mutual_info_score

    assigned, categories = assigned_N.cpu().tolist(), categories_N.cpu().tolist()
    if not assigned:
        return {"purity": 0.0, "nmi": 0.0, "prototypes_used": 0.0, "samples": 0.0}
    per_prototype: dict[int, Counter[int]] = {}
    for prototype, category in zip(assigned, categories, strict=True):
        per_prototype.setdefault(prototype, Counter())[category] += 1
    majority = sum(max(counts.values()) for counts in per_prototype.values())
    return {
        "purity": majority / len(assigned),
        "nmi": float(normalized_mutual_info_score(categories, assigned)),
        "prototypes_used": float(len(per_prototype)),
        "samples": float(len(assigned)),
    }


def _shares(labels: Tensor, total: int) -> dict[int, int]:
    counts = Counter(labels.tolist())
    if not counts:
        return {}
    if len(counts) > total:  # too few prototypes: the largest categories get one each
        largest = sorted(counts, key=lambda c: (-counts[c], c))[:total]
        return dict.fromkeys(sorted(largest), 1)
    spare, size = total - len(counts), len(labels)
    exact = {c: spare * n / size for c, n in counts.items()}
    shares = {c: 1 + int(exact[c]) for c in counts}
    by_remainder = sorted(counts, key=lambda c: (int(exact[c]) - exact[c], c))
    for c in by_remainder[: total - sum(shares.values())]:
        shares[c] += 1
    return {c: shares[c] for c in sorted(shares)}


def _spherical_kmeans(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    centres = points[_spread_start(points, count, generator)].clone()
    assigned = torch.full((len(points),), -1)
    for _ in range(_ITERATIONS):
        similarity = points @ centres.T
        nearest = similarity.argmax(dim=1)
        if torch.equal(nearest, assigned):
            break
        assigned = nearest
        sums = torch.zeros_like(centres).index_add_(0, assigned, points)
        norms = sums.norm(dim=1, keepdim=True)
        # an empty or cancelling cluster keeps its centre: it may win points later
        centres = torch.where(norms > 1e-6, sums / norms.clamp_min(1e-6), centres)
    return centres


def _spread_start(points: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """k-means++ on cosine distance: far points are likelier starts."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    distance = 1 - points @ points[chosen[0]]
    while len(chosen) < count:
        weights = distance.clamp_min(0)
        if float(weights.sum()) <= 0:
            taken = set(chosen)
            left = [i for i in range(len(points)) if i not in taken]
            chosen += left[: count - len(chosen)]
            break
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        distance = torch.minimum(distance, 1 - points @ points[chosen[-1]])
    return chosen

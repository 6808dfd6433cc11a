"""Concept vectors from the relations alone: graph embeddings through torch_geometric.

What comes out is a user's table for knowledge.vectors: one row a concept that has a relation.
What does not live here: centring, whitening and the zero rows of all others (vectors.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlip.knowledge.concepts import ConceptTable
from mlip.system.output_file import whole_file

if TYPE_CHECKING:  # the other sub-commands of `mlip knowledge` need no torch: two seconds
    from torch import Tensor

MODELS = {"transe": "TransE", "rotate": "RotatE", "distmult": "DistMult", "complex": "ComplEx"}
_KIND = "concept vectors"
_LEARNING_RATE = 0.01  # of the library's own examples
_BATCH = 4096
_HELD_OUT_SHARE, _HELD_OUT_MOST = 0.1, 500
_TOP = 10


def triplets(table: ConceptTable) -> tuple[Tensor, list[str]]:
    """Edges of is-a and of every relation whose ends exist.

    Returns: int64 [edges, 3] (row, relation, row) and the relations' names
    """
    import torch

    edges = [(c.id, "is_a", parent) for c in table for parent in c.parents]
    edges += [(c.id, relation, target) for c in table for relation, target in c.relations]
    edges = [edge for edge in dict.fromkeys(edges) if edge[2] in table]
    names = list(dict.fromkeys(name for _, name, _ in edges))
    rows = [(table.index[a], names.index(name), table.index[b]) for a, name, b in edges]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3), names


def graph_vectors(
    table: ConceptTable,
    *,
    model: str = "transe",
    dim: int = 64,
    epochs: int = 300,
    seed: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(vectors [dim] of the concepts that have a relation, how well held-out edges are found).

    The second is measured on a tenth of the edges with a model trained on the others; the vectors
    come from a model trained on all of them. Chance of hits@10 is 10 / concepts.
    Returns: scores {"edges", "held_out", "mean_rank", "mrr", "hits_at_10", "chance"}
    Raises:  ValueError without the library, with an unknown model, or with fewer than two edges
    Source:  TransE: Bordes et al. 2013; a translation is the only one of the four that holds on a
             graph as small as the lexicon's (docs/knowledge.md)
    """
    import torch

    if model not in MODELS:
        raise ValueError(f"model {model!r}: expected one of {sorted(MODELS)}")
    if dim < 1 or epochs < 1:
        raise ValueError(f"expected dim and epochs of 1 or more, got {dim} and {epochs}")
    try:
        library = importlib.import_module("torch_geometric.nn.kge")
    except ImportError as error:
        raise ValueError(
            "graph embeddings need torch_geometric, which is not installed: "
            "pip install '.[graph]' in the checkout"
        ) from error
    edges, names = triplets(table)
    if len(edges) < 2:
        raise ValueError(
            f"graph embeddings: {len(edges)} relations between the {len(table)} concepts; expected "
            "a table with is-a, located-in or other relations"
        )
    build: Any = getattr(library, MODELS[model])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.randperm(len(edges))
        held = edges[order[: max(1, min(int(len(edges) * _HELD_OUT_SHARE), _HELD_OUT_MOST))]]
        steps = 2 * epochs
        trial = _train(
            build(len(table), len(names), dim),
            edges[order[len(held) :]],
            epochs,
            progress,
            0,
            steps,
        )
        rank, mrr, hits = trial.test(*held.T, batch_size=len(held), k=_TOP, log=False)
        final = _train(build(len(table), len(names), dim), edges, epochs, progress, epochs, steps)
    weights = final.node_emb.weight.detach().clone()
    if hasattr(final, "node_emb_im"):  # complex-valued models keep the imaginary half apart
        weights = torch.cat([weights, final.node_emb_im.weight.detach()], dim=1)
    known = sorted(set(edges[:, 0].tolist()) | set(edges[:, 2].tolist()))
    scores = {
        "edges": float(len(edges)),
        "held_out": float(len(held)),
        "mean_rank": float(rank),
        "mrr": float(mrr),
        "hits_at_10": float(hits),
        "chance": min(1.0, _TOP / len(table)),
    }
    return {table.concepts[row].id: weights[row].clone() for row in known}, scores


def write_vectors(
    vectors: dict[str, Tensor],
    path: str | Path,
    *,
    require_own: Callable[[Path], None] | None = None,
) -> None:
    """A safetensors table that knowledge.vectors takes; require_own as of whole_file."""
    from safetensors.torch import save

    with whole_file(Path(path), require_own=require_own) as partial:
        # not save_file: it writes under a name of its own, which a kill would leave
        partial.write_bytes(save(vectors, metadata={_KIND: "mlip knowledge embed"}))


def is_vectors(path: Path) -> bool:
    """Whether write_vectors wrote this file: weights of a model have the same suffix."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as stored:
            return _KIND in (stored.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _train(
    model: Any,
    edges: Tensor,
    epochs: int,
    progress: Callable[[int, int], None] | None,
    done: int,
    total: int,
) -> Any:
    import torch

    optimizer = torch.optim.Adam(model.parameters(), lr=_LEARNING_RATE)
    for epoch in range(epochs):
        for rows in torch.randperm(len(edges)).split(_BATCH):
            optimizer.zero_grad()
            loss = model.loss(*edges[rows].T)
            loss.backward()
            optimizer.step()
        if progress is not None:
            progress(done + epoch + 1, total)
    return model.eval()

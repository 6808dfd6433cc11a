"""Graph embeddings of the relations: what is trained, what is left out, what is said.

Oracle of the quality: held-out edges against chance, with the library where it is installed; the
flow around it is tested with a stand-in of the same interface.
"""

import argparse
import copy
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mlip.commands.knowledge import add_arguments, run
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import Concept, ConceptTable
from mlip.knowledge.graph import graph_vectors, triplets, write_vectors
from mlip.knowledge.vectors import knowledge_vectors
from mlip.settings.config import Knowledge


class StandIn(nn.Module):
    """The library's interface: distance of head + relation to tail against a shifted tail."""

    made: "list[StandIn]" = []

    def __init__(self, num_nodes, num_relations, hidden_channels):
        super().__init__()
        self.made.append(self)
        self.node_emb = nn.Embedding(num_nodes, hidden_channels)
        self.rel_emb = nn.Embedding(num_relations, hidden_channels)
        self.begun = copy.deepcopy(self.state_dict())

    def _score(self, head, relation, tail):
        moved = self.node_emb(head) + self.rel_emb(relation)
        return -(moved - self.node_emb(tail)).norm(dim=1)

    def loss(self, head, relation, tail):
        wrong = torch.randint(self.node_emb.num_embeddings, tail.shape)
        margin = 1 + self._score(head, relation, wrong) - self._score(head, relation, tail)
        return margin.clamp_min(0).mean()

    def test(self, head, relation, tail, batch_size, k, log):
        nodes = torch.arange(self.node_emb.num_embeddings)
        ranks = []
        for h, r, t in zip(head, relation, tail, strict=True):
            scores = self._score(h.expand(len(nodes)), r.expand(len(nodes)), nodes)
            ranks.append(int((scores > scores[t]).sum()) + 1)
        found = torch.tensor(ranks).float()
        return found.mean(), (1 / found).mean(), (found <= k).float().mean()


@pytest.fixture
def stand_in(monkeypatch):
    library = types.SimpleNamespace(TransE=StandIn)
    monkeypatch.setattr(StandIn, "made", [])
    monkeypatch.setitem(sys.modules, "torch_geometric.nn.kge", library)


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(words))


def test_edges_are_those_whose_ends_exist_each_once():
    table = ConceptTable(
        [
            Concept(id="a", name="a1", parents=("b", "b", "gone")),
            Concept(id="b", name="b1", relations=(("located_in", "c"), ("suggests", "gone"))),
            Concept(id="c", name="c1"),
        ]
    )
    edges, names = triplets(table)
    assert names == ["is_a", "located_in"] and edges.tolist() == [[0, 0, 1], [1, 1, 2]]


def test_concepts_with_a_relation_get_a_vector_the_same_each_time(stand_in):
    table = load_concepts(None)
    seen: list[tuple[int, int]] = []
    before = torch.random.get_rng_state()
    vectors, scores = graph_vectors(table, dim=16, epochs=4, progress=lambda *a: seen.append(a))
    again, _ = graph_vectors(table, dim=16, epochs=4)
    assert torch.equal(before, torch.random.get_rng_state())
    edges, _ = triplets(table)
    linked = {table.concepts[row].id for row in edges[:, [0, 2]].flatten().tolist()}
    assert set(vectors) == linked and len(linked) < len(table)
    assert all(torch.equal(vectors[name], again[name]) for name in vectors)
    assert seen[-1] == (8, 8)
    trained = StandIn.made[1]  # on all edges, behind the trial
    losses = []
    for state in (trained.state_dict(), trained.begun):
        trained.load_state_dict(state)
        torch.manual_seed(0)
        losses.append(trained.loss(*edges.T).item())
    assert losses[0] < 0.95 * losses[1]  # 0.906; without a step equal
    assert scores["held_out"] == len(edges) // 10 and 0 <= scores["hits_at_10"] <= 1


def test_the_table_is_one_that_knowledge_vectors_takes_with_zero_rows_for_the_rest(
    stand_in, tmp_path
):
    table = load_concepts(None)
    vectors, _ = graph_vectors(table, dim=16, epochs=2)
    write_vectors(vectors, tmp_path / "graph.safetensors")
    rows = knowledge_vectors(table, Knowledge(vectors=str(tmp_path / "graph.safetensors")))
    known = torch.tensor([c.id in vectors for c in table])
    assert torch.equal(rows.norm(dim=1) > 0.5, known)


def test_the_command_writes_the_table_and_says_how_good_it_is(stand_in, tmp_path, capsys):
    out = tmp_path / "graph.safetensors"
    for _ in range(2):  # its own file is replaced
        assert call("embed", "--out", str(out), "--epochs", "5", "--dim", "8") == 0
    said = capsys.readouterr().out
    assert "held-out edges" in said and "chance" in said
    assert load_file(out)["pleural_effusion"].shape == (8,)


def test_a_file_that_appears_during_the_training_stays(stand_in, tmp_path, monkeypatch, capsys):
    out = tmp_path / "graph.safetensors"

    def and_a_file_appears(*given, **settings):
        out.write_text("another's")
        return graph_vectors(*given, **settings)

    monkeypatch.setattr("mlip.commands.knowledge.graph_vectors", and_a_file_appears)
    assert call("embed", "--out", str(out), "--epochs", "5", "--dim", "8") == 2
    assert capsys.readouterr().err.endswith(f"kept in {tmp_path / 'graph-2.safetensors'}\n")
    assert out.read_text() == "another's"
    assert load_file(tmp_path / "graph-2.safetensors")["pleural_effusion"].shape == (8,)


def test_what_cannot_be_trained_is_named(stand_in, tmp_path, monkeypatch, capsys):
    alone = ConceptTable([Concept(id="a", name="a1"), Concept(id="b", name="b1")])
    with pytest.raises(ValueError, match="0 relations between the 2 concepts"):
        graph_vectors(alone)
    with pytest.raises(ValueError, match="expected one of"):
        graph_vectors(load_concepts(None), model="transx")
    with pytest.raises(ValueError, match="1 or more"):
        graph_vectors(load_concepts(None), dim=0)
    assert call("embed", "--out", str(tmp_path / "x.npz")) == 2
    monkeypatch.setitem(sys.modules, "torch_geometric.nn.kge", None)  # as if not installed
    assert call("embed", "--out", str(tmp_path / "x.safetensors")) == 2
    assert "pip install '.[graph]'" in capsys.readouterr().err


@pytest.mark.long
def test_the_library_finds_held_out_edges_far_above_chance():
    pytest.importorskip("torch_geometric", reason="extra graph is not installed")
    vectors, scores = graph_vectors(load_concepts(None))
    assert scores["hits_at_10"] > 0.3 > 5 * scores["chance"]
    assert next(iter(vectors.values())).shape == (64,)

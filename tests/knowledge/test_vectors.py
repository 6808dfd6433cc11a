"""Knowledge vectors: centred, whitened, distinct; caches and user tables."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mlip.knowledge import vectors as vectors_module
from mlip.knowledge.concept_files import load_concepts
from mlip.knowledge.concepts import Concept, ConceptTable
from mlip.knowledge.vectors import knowledge_vectors, mean_pairwise_cosine
from mlip.settings.config import Knowledge


@pytest.fixture(scope="module")
def table():
    return load_concepts(None)


def alike(texts: list[str]) -> torch.Tensor:
    """An untrained tower: one large common direction, small differences (cosine about 0.99)."""
    rows = [
        torch.randn(64, generator=torch.Generator().manual_seed(len(t) * 7919 + ord(t[0])))
        for t in texts
    ]
    return torch.stack(rows) * 0.1 + 5.0


def test_tfidf_vectors_are_distinct_unit_rows_of_the_asked_width(table):
    vectors = knowledge_vectors(table, Knowledge(dim=128))
    assert vectors.shape == (len(table), 128) and vectors.dtype == torch.float32
    assert torch.allclose(vectors.norm(dim=1), torch.ones(len(table)), atol=1e-5)
    signed, absolute = mean_pairwise_cosine(vectors)
    assert abs(signed) <= 0.3 and absolute <= 0.3


def test_cosines_that_cancel_count_by_their_size():
    rows = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 3.0]])  # a zero row is unknown
    assert mean_pairwise_cosine(rows) == pytest.approx((-1 / 3, 1 / 3))
    assert all(np.isnan(mean_pairwise_cosine(rows[2:])))  # one known row has no pair


def test_the_mean_cosine_is_that_of_all_pairs_however_many_are_taken_at_once(monkeypatch):
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(1)) + 0.3
    # oracle: the pairs one by one
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    each = [float(unit[i] @ unit[j]) for i in range(50) for j in range(i)]
    monkeypatch.setattr(vectors_module, "_ROWS_AT_ONCE", 7)
    signed, absolute = mean_pairwise_cosine(rows)
    assert signed == pytest.approx(np.mean(each), abs=1e-12)
    assert absolute == pytest.approx(np.mean(np.abs(each)), abs=1e-12)


def test_related_concepts_are_nearer_than_unrelated_ones(table):
    vectors = knowledge_vectors(table, Knowledge())

    def cosine(a, b):
        return float(vectors[table.index[a]] @ vectors[table.index[b]])

    assert cosine("picc", "central_venous_catheter") > cosine("picc", "scoliosis") + 0.1
    assert cosine("left_apex", "right_apex") > cosine("left_apex", "pacemaker") + 0.1


def test_vectors_repeat_bit_for_bit_and_tables_narrower_than_dim_are_padded():
    small = ConceptTable(Concept(id=f"c{i}", name=f"sign {w}") for i, w in enumerate("abcde"))
    first, second = (knowledge_vectors(small, Knowledge(dim=16)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (5, 16) and not first[:, 4:].any()


def test_the_states_of_an_untrained_tower_are_pulled_apart(table):
    raw = alike([c.name for c in table])
    assert mean_pairwise_cosine(raw)[0] > 0.9
    vectors = knowledge_vectors(table, Knowledge(vectors="text_tower", dim=32), alike)
    assert mean_pairwise_cosine(vectors)[1] <= 0.3
    with pytest.raises(ValueError, match="needs the text tower"):
        knowledge_vectors(table, Knowledge(vectors="text_tower"))


@pytest.mark.parametrize("kind", ["of another length", "not a number"])
def test_a_tower_that_answers_nonsense_is_an_error(table, kind):
    of_nan = torch.full((len(table), 4), float("nan"))
    answer = of_nan if kind == "not a number" else torch.zeros(3, 4)
    with pytest.raises(ValueError, match="encode: expected finite"):
        knowledge_vectors(
            table, Knowledge(vectors="text_tower"), lambda t: answer if len(t) > 2 else answer[:2]
        )


def test_the_cache_is_used_and_keyed_by_table_settings_and_encoder(table, tmp_path):
    calls = []

    def counted(texts):
        calls.append(len(texts))
        return alike(texts)

    settings = Knowledge(vectors="text_tower", dim=16, cache_dir=str(tmp_path))
    first = knowledge_vectors(table, settings, counted)
    second = knowledge_vectors(table, settings, counted)
    assert torch.equal(first, second)
    assert calls == [2, len(table), 2]  # the second time only the probes are encoded
    other = knowledge_vectors(table, settings, lambda t: alike(t) ** 2)
    assert not torch.equal(first, other)
    by_words = Knowledge(dim=16, cache_dir=str(tmp_path))
    before = knowledge_vectors(table, by_words)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert len(list(tmp_path.iterdir())) == 3
    # another table of as many concepts: one is defined otherwise
    defined = dataclasses.replace(table.concepts[0], definition="Air in the wrong place.")
    edited = ConceptTable([defined, *table.concepts[1:]], table.provenance)
    assert not torch.equal(knowledge_vectors(edited, by_words)[0], before[0])
    assert torch.equal(knowledge_vectors(table, by_words), before)


def test_a_users_table_gives_zero_rows_to_concepts_it_does_not_know(table, tmp_path, caplog):
    path = tmp_path / "vectors.safetensors"
    torch.manual_seed(1)
    known = list(table.index)[:50]
    save_file({name: torch.randn(24) + 3 for name in [*known, "foreign"]}, path)
    with caplog.at_level("INFO", "mlip"):
        vectors = knowledge_vectors(table, Knowledge(vectors=str(path)))
    assert f"50 of {len(table)} concepts have a vector" in caplog.text
    assert vectors.shape == (len(table), 24)
    norms = vectors.norm(dim=1)
    assert torch.allclose(norms[:50], torch.ones(50), atol=1e-5) and not norms[50:].any()
    assert mean_pairwise_cosine(vectors)[1] <= 0.3


def test_a_users_table_that_cannot_be_used_is_named(table, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no tensors")
    cases = [(str(tmp_path / "gone"), "existing safetensors"), (str(bad), "not a safetensors")]
    save_file({"foreign": torch.ones(4)}, tmp_path / "foreign.safetensors")
    cases.append((str(tmp_path / "foreign.safetensors"), "none of its 1 keys"))
    rows = {"pleural_effusion": torch.ones(4), "pneumothorax": torch.ones(5)}
    save_file(rows, tmp_path / "uneven.safetensors")
    cases.append((str(tmp_path / "uneven.safetensors"), "one width"))
    save_file({"pleural_effusion": torch.tensor([1.0, float("inf")])}, tmp_path / "inf.safetensors")
    cases.append((str(tmp_path / "inf.safetensors"), "NaN or Inf"))
    for path, message in cases:
        with pytest.raises(ValueError, match=message):
            knowledge_vectors(table, Knowledge(vectors=path))


def test_a_table_that_is_too_large_for_dense_factors_has_the_same_vectors_without(
    table, monkeypatch
):
    # oracle: the singular vectors of the dense table
    dense = knowledge_vectors(table, Knowledge(dim=64))
    monkeypatch.setattr(vectors_module, "_DENSE_ROWS", 0)
    assert torch.allclose(knowledge_vectors(table, Knowledge(dim=64)), dense, rtol=0, atol=1e-7)


def test_large_tables_are_sketched_within_memory():
    big = ConceptTable(
        Concept(id=f"c{i}", name=f"sign {i * 7919 % 10007}", definition=f"number {i}")
        for i in range(3200)
    )
    vectors = knowledge_vectors(big, Knowledge(dim=16))
    assert vectors.shape == (3200, 16)
    assert mean_pairwise_cosine(vectors[:500])[1] <= 0.3


def test_of_a_large_table_the_commonest_pieces_are_taken_and_it_is_said(monkeypatch, caplog):
    monkeypatch.setattr(vectors_module, "_EXACT_ROWS", 10)
    table = ConceptTable(
        Concept(id=f"c{i}", name=f"{'lung' if i % 2 else 'heart'} sign {i:03d}") for i in range(60)
    )
    with caplog.at_level("INFO", "mlip"):
        whole = knowledge_vectors(table, Knowledge(dim=8))
        monkeypatch.setattr(vectors_module, "_MOST_PIECES", 40)
        cut = knowledge_vectors(table, Knowledge(dim=8))
    assert "60 concepts" in caplog.text and "knowledge.cache_dir" in caplog.text
    assert whole.shape == cut.shape == (60, 8) and not torch.equal(whole, cut)
    assert torch.allclose(cut.norm(dim=1), torch.ones(60))

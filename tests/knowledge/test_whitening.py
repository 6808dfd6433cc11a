"""Whitened rows: equal spread in each direction; a sparse table's are those of its dense form."""

import tracemalloc

import numpy as np
import pytest
from scipy.sparse import csr_array, random_array

from mlip.knowledge.whitening import whiten, whiten_sparse


def test_whitening_gives_each_direction_the_same_spread():
    rng = np.random.default_rng(1)
    raw = rng.normal(size=(400, 12)) @ rng.normal(size=(12, 12)) + 50
    # oracle: rows of the whitened table are rows of raw @ covariance^(-1/2), up to a rotation
    centred = raw - raw.mean(0)
    values, basis = np.linalg.eigh(centred.T @ centred)
    oracle = centred @ basis / np.sqrt(values)
    oracle /= np.linalg.norm(oracle, axis=1, keepdims=True)
    white = whiten(raw, 12)
    assert np.allclose(white @ white.T, oracle @ oracle.T, atol=1e-8)


def sparse(rows: int, columns: int, *, density: float = 0.02) -> csr_array:
    rng = np.random.default_rng(3)
    return random_array((rows, columns), density=density, rng=rng, format="csr")


@pytest.mark.parametrize("dim", [3, 90, 300])  # within one block of signs, over it, over the rows
def test_a_sparse_table_is_whitened_as_its_dense_form_signs_too(dim):
    rows = sparse(200, 1500)
    found, oracle = whiten_sparse(rows, dim), whiten(rows.toarray(), dim)
    assert found.shape == (200, dim) and (oracle != 0).any(axis=0).sum() == min(dim, 199)
    assert np.allclose(found, oracle, rtol=0, atol=1e-10)


def test_rows_without_an_entry_stay_zero_and_out_of_the_mean():
    rows = sparse(80, 600, density=0.1)
    some = np.arange(80) % 5 != 0
    holes = rows.toarray() * some[:, None]
    found = whiten_sparse(csr_array(holes), 10)
    assert not found[~some].any()
    assert np.allclose(found[some], whiten_sparse(rows[some], 10), rtol=0, atol=1e-12)
    # one known row has no direction of its own
    alone = csr_array(holes * (np.arange(80) == 7)[:, None])
    assert np.array_equal(whiten_sparse(alone, 4), whiten(alone.toarray(), 4))


def test_of_a_sparse_table_of_low_rank_the_directions_beyond_it_are_zero():
    """In the products rounding is a share of 1e-8 of the widest direction, not of 1e-16."""
    few = sparse(6, 900, density=0.3).toarray()
    rows = csr_array(few[np.arange(120) % 6])  # rank 6, centred 5
    found = whiten_sparse(rows, 12)
    assert not found[:, 5:].any() and found[:, :5].any(axis=0).all()
    # directions of one spread are free to turn: the cosines of the rows are not
    oracle = whiten(rows.toarray(), 12)
    assert np.allclose(found @ found.T, oracle @ oracle.T, rtol=0, atol=1e-9)


def test_of_rows_that_are_all_alike_no_direction_is_left():
    rows = np.ones((6, 4))  # their centred products are exactly 0
    assert np.array_equal(whiten_sparse(csr_array(rows), 3), np.zeros((6, 3)))
    assert np.array_equal(whiten(rows, 3), np.zeros((6, 3)))


def test_a_sparse_table_is_never_made_dense():
    rows = sparse(600, 40_000, density=0.002)
    dense_bytes = 8 * 600 * 40_000
    tracemalloc.start()
    whiten_sparse(rows, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < dense_bytes / 2

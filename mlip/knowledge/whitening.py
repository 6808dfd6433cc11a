"""Rows of vectors centred, whitened along their widest directions, of unit length.

What does not live here: what the rows are of (vectors.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

# a direction holding less than this share of the largest spread is rounding noise, not whitened
_RANK_TOLERANCE = 1e-5
_ROWS_AT_ONCE = 64  # of a product with a sparse table: 64 x 100,000 pieces are 51 MB


def whiten(raw_ED: np.ndarray, dim: int) -> np.ndarray:
    """Rows centred, whitened along the `dim` widest directions, scaled to unit length.

    Rows that are entirely zero are unknown: they are left out of the statistics and stay zero.
    Returns: [E, dim] float64; directions beyond the rank are zero
    """
    raw_ED = np.asarray(raw_ED, dtype=np.float64)
    known = np.abs(raw_ED).sum(axis=1) > 0
    result = np.zeros((len(raw_ED), dim))
    if known.sum() < 2:
        result[known, 0] = 1.0
        return result
    centred = raw_ED[known] - raw_ED[known].mean(axis=0)
    left, spread, right = np.linalg.svd(centred, full_matrices=False)
    rank = min(int((spread > spread[0] * _RANK_TOLERANCE).sum()), dim)
    # the sign of a singular vector is free: fixed here so that every machine gets one answer
    signs = np.sign(right[np.arange(rank), np.abs(right[:rank]).argmax(axis=1)])
    white = left[:, :rank] * signs
    norms = np.linalg.norm(white, axis=1, keepdims=True)
    result[known, :rank] = white / np.maximum(norms, 1e-12)
    return result


def whiten_sparse(rows_EF: Any, dim: int) -> np.ndarray:
    """whiten of a sparse table without its dense form: memory E * (E + dim) beside the table.

    Rows without an entry are unknown, as rows of zeros are to `whiten`.
    Shapes:  rows_EF [E, F], a matrix of scipy.sparse
    Returns: [E, dim] float64, within 1e-10 of `whiten` where directions are of different spread:
             the left factors are eigenvectors of the rows' products with each other, whose rounding
             grows as (largest spread / spread)^2, and of TF-IDF that is some hundreds
    """
    from scipy.linalg import eigh

    rows_EF = rows_EF.tocsr()
    known = np.diff(rows_EF.indptr) > 0
    result = np.zeros((len(known), dim))
    if known.sum() < 2:
        result[known, 0] = 1.0
        return result
    rows = rows_EF[known]
    count = rows.shape[0]
    products = np.empty((count, count))
    for start in range(0, count, _ROWS_AT_ONCE):
        part = rows[start : start + _ROWS_AT_ONCE].toarray()
        products[start : start + len(part)] = (rows @ part.T).T
    # products of centred rows, without centring the rows: that would fill their zeros
    mean = products.mean(axis=0)
    products -= mean
    products -= (mean - mean.mean())[:, None]
    most = min(dim, count)
    squares, left = eigh(
        products,
        subset_by_index=[count - most, count - 1],
        overwrite_a=True,
        check_finite=False,
    )
    squares, left = squares[::-1], left[:, ::-1]  # widest first
    spread = np.sqrt(np.maximum(squares, 0.0))
    rank = int((spread > spread[0] * _RANK_TOLERANCE).sum())
    if not rank:  # all rows are one
        return result
    white = left[:, :rank] * _signs(rows, left[:, :rank])
    norms = np.linalg.norm(white, axis=1, keepdims=True)
    result[known, :rank] = white / np.maximum(norms, 1e-12)
    return result


def _signs(rows: Any, left_Er: np.ndarray) -> np.ndarray:
    """The sign of each direction's entry of largest size, as `whiten` has it of its right factors.

    Those are (rows - mean)^T @ left over the spread, which has no sign.
    """
    mean = np.asarray(rows.mean(axis=0)).ravel()
    signs = []
    for start in range(0, left_Er.shape[1], _ROWS_AT_ONCE):
        part = left_Er[:, start : start + _ROWS_AT_ONCE]
        right = rows.T @ part - np.outer(mean, part.sum(axis=0))
        signs.append(np.sign(right[np.abs(right).argmax(axis=0), np.arange(part.shape[1])]))
    return np.concatenate(signs)

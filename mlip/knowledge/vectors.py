"""One fixed vector per concept: TF-IDF, the text tower, or a user's table; centred and whitened.

What does not live here: the arithmetic of that (whitening.py), the trainable projection and the
state embedding (model).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mlip.knowledge.concepts import ConceptTable
from mlip.knowledge.whitening import whiten, whiten_sparse
from mlip.settings.config import Knowledge
from mlip.system.output_file import whole_file

logger = logging.getLogger("mlip")

Encode = Callable[[list[str]], Tensor]
_VERSION = 2  # part of the cache key: raise it when the arithmetic below changes
_PROBES = ["no pleural effusion", "the heart is enlarged"]  # identify an encoder by what it says
_ROWS_AT_ONCE = 256  # of the cosines of all pairs
_MOST_PIECES = 1 << 17  # the commonest: the sketch holds knowledge.dim numbers of each, twice
_EXACT_ROWS = 3000  # above, the exact factors would take minutes: sketched instead, with a seed
# up to here the factors are those of the dense table, to the bit what published runs trained with;
# of 3,000 concepts it took 3 GB and a minute
_DENSE_ROWS = 500


def knowledge_vectors(
    table: ConceptTable, settings: Knowledge, encode: Encode | None = None
) -> Tensor:
    """Vectors of all concepts in table order, centred, whitened, rows of unit length.

    A concept that the source knows nothing of has the zero row.
    Shapes:  encode(list of n texts) -> [n, d]
    Returns: [E, d] float32; d = settings.dim, or the width of the user's table
    Raises:  ValueError where settings.vectors cannot be honoured
    Source:  method.md section 2 (ours); TF-IDF + latent semantic analysis: Deerwester et al. 1990
    """
    kind = settings.vectors
    if kind not in ("tfidf", "text_tower"):
        return _user_table(table, Path(kind))
    texts = [concept_text(table, row) for row in range(len(table))]
    key = f"{_VERSION}|{kind}|{settings.dim}|{table.fingerprint}"
    if kind == "text_tower":
        if encode is None:
            raise ValueError(
                "knowledge.vectors=text_tower needs the text tower: pass encode(list of texts) "
                "-> [n, d], or set knowledge.vectors=tfidf"
            )
        probe = encode(_PROBES).detach().to("cpu", torch.float32).contiguous().numpy()
        key += f"|{probe.shape}|{hashlib.sha256(probe.tobytes()).hexdigest()}"
    cached = None
    if settings.cache_dir is not None:
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        cached = Path(settings.cache_dir) / f"knowledge_vectors_{name}.safetensors"
        if cached.exists():
            try:
                return load_file(cached)["vectors"]
            except (SafetensorError, KeyError, OSError) as error:
                raise ValueError(
                    f"knowledge.cache_dir: {cached} cannot be read: {error}; delete it, it will be "
                    "made again"
                ) from error
    if kind == "tfidf":
        white = _tfidf(texts, settings.dim)
    else:
        assert encode is not None
        raw = encode(texts).detach().to("cpu", torch.float64).numpy()
        if raw.ndim != 2 or raw.shape[0] != len(texts) or not np.isfinite(raw).all():
            raise ValueError(
                f"encode: expected finite [{len(texts)}, d], got shape {tuple(raw.shape)}"
                + ("" if np.isfinite(raw).all() else " with NaN or Inf")
            )
        white = whiten(raw, settings.dim)
    vectors = torch.from_numpy(white).float()
    if cached is not None:
        _save(vectors, cached)
    return vectors


def concept_text(table: ConceptTable, row: int) -> str:
    """What is encoded for a concept: name, then definition, or synonyms where it has none."""
    concept = table.concepts[row]
    return f"{concept.name}: {concept.definition or ', '.join(concept.synonyms)}"


def mean_pairwise_cosine(vectors_ED: Tensor) -> tuple[float, float]:
    """(mean, mean of the absolute value) of the cosine over all pairs of known rows."""
    rows = vectors_ED.double()
    rows = rows[rows.norm(dim=1) > 1e-6]
    rows = rows / rows.norm(dim=1, keepdim=True)
    signed = absolute = 0.0
    for start in range(0, len(rows), _ROWS_AT_ONCE):  # all pairs of 5,000 at once: a gigabyte
        cosine = (rows[start : start + _ROWS_AT_ONCE] @ rows[start:].T).triu(diagonal=1)
        signed += float(cosine.sum())
        absolute += float(cosine.abs().sum())
    pairs = len(rows) * (len(rows) - 1) / 2
    return (signed / pairs, absolute / pairs) if pairs else (math.nan, math.nan)


def _tfidf(texts: list[str], dim: int) -> np.ndarray:
    """Whitened rows of the texts, [E, dim] float64."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    is_exact = len(texts) <= _EXACT_ROWS
    if not is_exact:
        logger.info(
            "knowledge.vectors=tfidf of %d concepts: about two seconds for each thousand; "
            "knowledge.cache_dir keeps them for the next start",
            len(texts),
        )
    # sub-word pieces relate "cardiomegaly" to "cardiac" where whole words share nothing
    vectorizer = TfidfVectorizer(
        analyzer="char_wb",
        ngram_range=(3, 5),
        sublinear_tf=True,
        max_features=None if is_exact else _MOST_PIECES,
    )
    rows = vectorizer.fit_transform(texts)
    if len(texts) <= _DENSE_ROWS:
        return whiten(rows.toarray(), dim)
    if is_exact:
        return whiten_sparse(rows, dim)
    # one direction more than asked for: the common one goes with the mean
    return whiten(TruncatedSVD(dim + 1, random_state=0).fit_transform(rows), dim)


def _user_table(table: ConceptTable, path: Path) -> Tensor:
    if not path.is_file():
        raise ValueError(
            f"knowledge.vectors: expected tfidf, text_tower or an existing safetensors file, "
            f"got {str(path)!r}"
        )
    try:
        rows = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"knowledge.vectors {path}: not a safetensors file: {error}") from error
    known = {name: row for name, row in rows.items() if name in table.index}
    if not known:
        raise ValueError(
            f"knowledge.vectors {path}: none of its {len(rows)} keys is a concept id of the table"
        )
    widths = {tuple(row.shape) for row in known.values()}
    if len(widths) != 1 or len(next(iter(widths))) != 1:
        raise ValueError(f"knowledge.vectors {path}: expected rows of one width, got {widths}")
    (width,) = next(iter(widths))
    raw = np.zeros((len(table), width))
    for name, row in known.items():
        raw[table.index[name]] = row.double().numpy()
    if not np.isfinite(raw).all():
        raise ValueError(f"knowledge.vectors {path}: NaN or Inf in it")
    vectors = torch.from_numpy(whiten(raw, width)).float()
    logger.info(
        "knowledge.vectors: %d of %d concepts have a vector in the table, the others count as not "
        "mentioned",
        int((vectors != 0).any(dim=1).sum()),
        len(table),
    )
    return vectors


def _save(vectors: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:  # another rank may be reading
        # not save_file: it writes under a name of its own, which a kill would leave
        partial.write_bytes(save({"vectors": vectors.contiguous()}))

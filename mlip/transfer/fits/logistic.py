"""The linear probe without an optimiser's settings: scikit-learn's logistic regression.

Its one setting, the strength of the penalty, is chosen on val for each class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from mlip.dataloading.progress import Progress
from mlip.transfer.array import Array

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # scikit-learn's C
MOST_ITERATIONS = 300


def fit_logistic(
    x: Array, targets: Array, x_val: Array, val_targets: Array, *, exclusive: bool
) -> Callable[[Array], Array]:
    """features [n, d] -> logits [n, classes].

    Shapes:  x [n, d], targets [n, classes] of 1, 0 or -1 (not known)
    A class that train has in one kind only gets the constant logit 0: it says nothing. Where
    classes exclude each other, one that train lacks is never called.
    """
    mean = x.mean(axis=0)
    spread = x.std(axis=0)
    spread[spread == 0] = 1.0

    def scaled(features: Array) -> Array:
        return (features - mean) / spread

    models: list[Any] = []
    columns = [None] if exclusive else list(range(targets.shape[1]))
    told = Progress("logistic fits")
    for k in columns:
        if k is None:
            known, known_val = np.ones(len(x), bool), np.ones(len(x_val), bool)
            y, y_val = targets.argmax(axis=1), val_targets.argmax(axis=1)
        else:
            known, known_val = targets[:, k] >= 0, val_targets[:, k] >= 0
            y, y_val = targets[known, k], val_targets[known_val, k]
        if len(np.unique(y)) < 2:
            models.append(int(y[0]) if exclusive else None)
            continue
        tried = []
        for i, strength in enumerate(STRENGTHS):
            told(len(models) * len(STRENGTHS) + i, len(columns) * len(STRENGTHS))
            model = LogisticRegression(C=strength, max_iter=MOST_ITERATIONS)
            model.fit(scaled(x[known]), y)
            tried.append((_loss(model, scaled(x_val[known_val]), y_val), model))
        models.append(min(tried, key=lambda pair: pair[0])[1])

    def predict(features: Array) -> Array:
        if exclusive:
            return _spread(models[0], scaled(features), targets.shape[1])
        return np.stack(
            [
                np.zeros(len(features)) if m is None else m.decision_function(scaled(features))
                for m in models
            ],
            axis=1,
        )

    return predict


def _loss(model: Any, x: Array, y: Array) -> float:
    """Mean negative log-likelihood; 0 on no rows, so that the first strength is taken."""
    if len(x) == 0:
        return 0.0
    seen = np.isin(y, model.classes_)
    if not seen.any():
        return 0.0
    return float(log_loss(y[seen], model.predict_proba(x[seen]), labels=model.classes_))


def _spread(model: Any, x: Array, classes: int) -> Array:
    """Logits by class; a class that train lacked is never chosen.

    model  the number of the class where train had one alone
    """
    logits = np.full((len(x), classes), -50.0)
    if isinstance(model, int):
        logits[:, model] = 0.0
        return logits
    found = model.decision_function(x)
    if found.ndim == 1:
        found = np.stack([np.zeros_like(found), found], axis=1)
    logits[:, model.classes_] = found
    return logits

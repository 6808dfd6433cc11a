"""Objective against method.md as float64 numpy loops, from what the towers give to the total.

Oracle: the document's formulas, written from it and docs/method.md and not from the code, and their
central differences. In them p holds parameters by the code's names; uniform and normal are the
keyed noise, (stream, width) -> [N, width].
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mlip.batch import ImageFeatures, TextFeatures
from mlip.keyed_random import keyed_normal, keyed_uniform
from mlip.model import MLIPModel
from mlip.objective import Objective
from mlip.unit_length import unit_length
from tests.losses.loss_inputs import PATCHES, config_of, make_batch, make_leaves, rows_of

Array = NDArray[Any]
HALF, HEADS = ("category", "matching", "swapping"), 2
TINY = (
    "model.vision.options={embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1]}",
    "model.text.options={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}",
    "model.vision.patch_stage=1",
)
CASES = {"all": range(9), "two": [1, 2], "one": [0], "one report twice": [0, 5], "empty": [4, 4]}
GROUPS = "leaf.image leaf.text leaf.patches leaf.tokens state_embedding knowledge_projection \
log_scale attention_scale knowledge_scale knowledge_gain divergence_image divergence_text \
prototypes matching".split()


def _unit(x: Array) -> Array:
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.where(length <= 1e-6, 0.0, x / np.where(length <= 1e-6, 1.0, length))


def _lse(x: Any) -> float:
    return float(np.max(x) + math.log(np.exp(np.asarray(x) - np.max(x)).sum()))


def _softmax(x: Array) -> Array:
    return np.exp(x - _lse(x))


def _gelu(x: Array) -> Array:
    return x * 0.5 * (1.0 + np.array([math.erf(v / math.sqrt(2.0)) for v in x]))


def _affine(p: Any, name: str, x: Array) -> Array:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def _layer_norm(p: Any, name: str, x: Array) -> Array:
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def _info_nce(z: Array, pair_id: Array, has_text: Array) -> float:
    """Mean over pairs with a text; equal pair_ids are no negatives; 0 where no anchor is left."""
    terms = []
    for i in has_text.nonzero()[0]:
        others = pair_id != pair_id[i]
        row, column = z[i, others & has_text], z[others, i]  # an image without its text stays
        terms.append(0.5 * (_lse([z[i, i], *row]) + _lse([z[i, i], *column])) - z[i, i])
    return sum(terms) / max(len(terms), 1)


def _diverged(p: Any, side: str, z: Array, uniform: Any, normal: Any) -> tuple[Array, float]:
    """(views [N, D], R_div of this modality), section 3."""
    name, D, heads = f"losses.global_contrastive.divergence_{side}", z.shape[1], 4
    prior, split = math.log(0.36 / D), D // heads
    keep = (uniform(f"divergence_{side}_dropout", 2 * D) >= 0.1) / 0.9
    eps = normal(f"divergence_{side}", D)
    views, kl, spread = [], [], []
    for n in range(len(z)):
        moments = _affine(p, f"{name}.moments", keep[n] * _gelu(_affine(p, f"{name}.hidden", z[n])))
        mu, log_var = moments[:D], np.clip(moments[D:], prior - 4.0, prior + 4.0)
        y = z[n] + mu + np.exp(log_var / 2) * eps[n]
        pair = _affine(p, f"{name}.key_value", np.stack([z[n], y]))
        query, seen = _affine(p, f"{name}.query", y), np.zeros(D)
        for at in (slice(h * split, (h + 1) * split) for h in range(heads)):
            weight = _softmax(pair[:, :D][:, at] @ query[at] / math.sqrt(split))
            seen[at] = weight @ pair[:, D:][:, at]
        views.append(_unit(y + _affine(p, f"{name}.out", seen)))
        kl.append(0.5 * (np.exp(log_var - prior) + mu**2 / np.exp(prior) - 1 - log_var + prior))
        spread.append(max(0.0, views[-1] @ z[n] - 0.9))
    return np.stack(views), 0.1 * float(np.mean(kl)) + 0.1 * float(np.mean(spread))


def _scores(patches: Array, tokens: Array, entities: Array, s: Array, scales: Any) -> Array:
    """S of all images with one text, token weights uniform, section 4."""
    w, k = _unit(tokens), _unit(entities)
    if len(k) and len(w):
        attended = np.stack([_softmax(scales["knowledge_scale"] * k @ row) @ k for row in w])
        w = _unit(w + scales["knowledge_gain"] * attended)
    share = (0.25 if s.any() else 0.0) if len(w) else 1.0
    weight = [(1 - share) / max(len(w), 1)] * len(w) + [share * x / max(s.sum(), 1e-9) for x in s]
    a, rows = scales["attention_scale"], np.concatenate([w, k])
    pooled = [[_softmax(a * x) @ x for x in rows @ patch.T] for patch in _unit(patches)]
    return np.array(pooled) @ np.array(weight)


def _sinkhorn(cosine: Array) -> Array:
    log_q = cosine / 0.05
    for _ in range(3):
        log_q = log_q - np.array([_lse(column) for column in log_q.T])
        log_q = log_q - np.array([[_lse(row)] for row in log_q])
    return np.exp(log_q)


def _judged(p: Any, report: Array, patches: Array) -> Array:
    """Logits (wrong, right): two pre-norm cross-attention layers in which [CLS] alone asks."""
    m = "losses.matching"
    x, q = _layer_norm(p, f"{m}.patch_norm", patches), _affine(p, f"{m}.report", report)
    for at in (f"{m}.layers.0", f"{m}.layers.1"):
        asked = _affine(p, f"{at}.query", _layer_norm(p, f"{at}.query_norm", q)).reshape(HEADS, -1)
        seen = []
        for h in range(HEADS):
            key, value = x @ p[f"{at}.key_HED"][h].T, x @ p[f"{at}.value_HDE"][h]
            seen.append(_softmax(key @ asked[h] / math.sqrt(key.shape[1])) @ value)
        q = q + _affine(p, f"{at}.out", np.concatenate(seen))
        wide = _affine(p, f"{at}.widen", _layer_norm(p, f"{at}.feed_norm", q))
        q = q + _affine(p, f"{at}.narrow", _gelu(wide))
    return _affine(p, f"{m}.classifier", _layer_norm(p, f"{m}.norm", q))


def _terms_of(p: Any, f: Any, uniform: Any, normal: Any, fixed: Any) -> dict[str, float]:
    """Every term and the total; fixed keeps the first call's codes and draws: no gradient."""
    count, pair_id, mask, state = len(f["image"]), f["pair_id"], f["entity_mask"], f["entity_state"]
    scales = {n.rsplit(".", 1)[1]: float(x[0]) for n, x in p.items() if ".scales." in n}
    v, t, everyone = _unit(f["image"]), _unit(f["text"]), np.ones(count, bool)
    present, s = mask & (state == 0), np.array([1.0, 0.0, 0.5])[state] * mask
    known = p["model.concept_vectors"][f["entity_ids"]] + p["model.state_embedding.weight"][state]
    entities = known @ p["model.knowledge_projection.weight"].T

    scale = math.exp(scales["log_scale"])
    view_v, part_v = _diverged(p, "image", v, uniform, normal)
    view_t, part_t = _diverged(p, "text", t, uniform, normal)
    pairings = [scale * a @ b.T for a in (v, view_v) for b in (t, view_t)]
    out = {"global_contrastive": sum(_info_nce(z, pair_id, everyone) for z in pairings) / 4}
    out["divergence"] = 0.5 * (part_v + part_t)

    shown, has_text = f["content_mask"], f["content_mask"].any(1) | s.any(1)
    texts = zip(f["tokens"], shown, entities, s, mask, strict=True)
    S = np.array([_scores(f["patches"], x[a], k[b], c[b], scales) for x, a, k, c, b in texts]).T
    out["local_alignment"] = _info_nce(math.exp(scales["log_scale_local"]) * S, pair_id, has_text)

    has_r, C = present.any(1), _unit(p["losses.category.prototypes"])
    r = _unit((entities * present[..., None]).sum(1))[has_r]
    if "codes" not in fixed:
        fixed["codes"] = [_sinkhorn(x @ C.T) if len(x) else x @ C.T for x in (v, t, r)]
    q_v, q_t, q_r = fixed["codes"]
    log_v, log_t = (np.array([x - _lse(x) for x in view @ C.T / 0.2]) for view in (v, t))
    pairs = [(q_t, log_v), (q_v, log_t), (q_r, log_v[has_r]), (q_r, log_t[has_r])]
    out["category"] = float(np.concatenate([-(q * log_p).sum(1) for q, log_p in pairs]).mean())

    found = zip(f["entity_ids"], present, strict=True)
    sets = np.array([frozenset(ids[on].tolist()) for ids, on in found], dtype=object)
    allowed = has_text[:, None] & has_text
    allowed &= (pair_id[:, None] != pair_id) & (sets[:, None] != sets)

    def draw(stream: str, cosine: Array) -> Array:
        partners = np.full(count, -1)
        for n in allowed.any(1).nonzero()[0]:
            may = allowed[n].nonzero()[0]
            mass = np.cumsum(_softmax(scale * cosine[n, may]))
            partners[n] = may[(mass < uniform(stream, 1)[n, 0] * mass[-1]).sum()]
        return partners

    if "draws" not in fixed:
        swapped = np.where(uniform("swap_choice", 1)[:, 0] < 0.5, draw("swap_partner", v @ t.T), -1)
        fixed["draws"] = draw("match_text", v @ t.T), draw("match_image", t @ v.T), swapped
    wrong_text, wrong_image, swapped = fixed["draws"]
    costs = []
    for n in (n for n in range(count) if wrong_text[n] >= 0):
        for image, text, right in ((n, n, 1), (n, wrong_text[n], 0), (wrong_image[n], n, 0)):
            logits = _judged(p, t[text], f["patches"][image])
            costs.append(_lse(logits) - logits[right])
    out["matching"] = sum(costs) / max(len(costs), 1)
    near = v @ t.T + 0.5 * S
    hinges = [max(0.0, 0.4 - near[i, i] + near[i, j]) for i, j in enumerate(swapped) if j >= 0]
    out["swapping"] = sum(hinges) / max(len(hinges), 1)
    return out | {"total": sum(x / 2 if n in HALF else x for n, x in out.items())}


def _both(rows: list[int]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The code's terms; the tensors behind them; the oracle as a function of their values now."""
    torch.manual_seed(0)
    model = MLIPModel(config := config_of(*TINY), vocab_size=9, concept_vectors=torch.randn(9, 7))
    leaves = {n: x[rows].requires_grad_() for n, x in make_leaves().items()}
    image = ImageFeatures(unit_length(leaves["image"]), leaves["patches"], (1, PATCHES))
    text = TextFeatures(unit_length(leaves["text"]), leaves["tokens"])
    model.encode_image, model.encode_text = lambda *_: image, lambda *_: text
    objective, batch = Objective(config, model).double(), make_batch()
    # beside what that holds: two states in one report, no mention in one, no token in one
    batch.entity_state[8, 2], batch.entity_mask[5], batch.content_mask[7] = 2, False, False
    batch = rows_of(batch, rows)
    with torch.no_grad():
        for parameter in [*objective.losses.parameters(), *model.scales.parameters()]:
            parameter.mul_(0.8).add_(0.1 * torch.randn_like(parameter))
    total, terms = objective(batch, step=4, progress=1.5)
    tensors = dict(objective.named_parameters()) | dict(objective.named_buffers())
    tensors |= {f"leaf.{n}": x for n, x in leaves.items()}
    values = {n: x.detach().numpy() for n, x in tensors.items()}  # the same memory
    known = {n: x for n, x in (vars(batch) | leaves).items() if x is not None}
    given = {n: x.detach().numpy() for n, x in known.items()}

    def draw(make: Any, stream: str, width: int) -> Any:
        return make(config.run.seed, stream, 4, batch.global_index, width).double().numpy()

    noise = partial(draw, keyed_uniform), partial(draw, keyed_normal)
    return {**terms, "total": total}, tensors, partial(_terms_of, values, given, *noise, {})


@pytest.mark.parametrize("case", CASES)
def test_every_term_and_the_total_equal_the_formulas(case: str) -> None:
    terms, _, oracle = _both(list(CASES[case]))
    expected = oracle()
    assert terms.keys() == expected.keys() and (case != "all" or min(expected.values()) > 0)
    for name, value in expected.items():
        # the category level's codes are float32 by definition
        loose = 1e-6 if name in ("category", "total") else 1e-12
        np.testing.assert_allclose(terms[name].detach(), value, loose, 1e-14, err_msg=name)


def test_gradients_of_the_total_equal_central_differences_of_the_formulas() -> None:
    terms, tensors, oracle = _both(list(CASES["all"]))
    terms["total"].backward()
    oracle()  # fixes codes and draws
    rng, step = np.random.default_rng(0), 1e-5
    for group in GROUPS:
        members = [x for n, x in tensors.items() if group in n and x.requires_grad]
        ways = [(x, torch.tensor(rng.normal(size=x.shape))) for x in members]
        ends = []
        for move in (step, -2 * step, step):
            for x, way in ways:
                x.data.add_(move * way)
            ends.append(oracle()["total"] if len(ends) < 2 else 0.0)
        slope = sum(float((x.grad * way).sum()) for x, way in ways)
        assert abs(slope) > 1e-4, group
        # 1e-6: the code holds the category level's codes in float32
        quotient = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(quotient, slope, 1e-6, 1e-9, err_msg=group)

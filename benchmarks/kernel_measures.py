"""The table of kernels/README.md, computed from rows of bench_kernels.py and never from memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
PAIR = {
    "op": "token_knowledge_patch",
    "pooling": "attention",
    "patches": 196,
    "fill": 1.0,
    "learned": False,
}
AT_256 = PAIR | {"batch": 256, "tokens": 112, "dim": 128}
MAX_256 = PAIR | {"batch": 256, "pooling": "max", "tokens": 64, "dim": 128}
SHORT_256 = PAIR | {"batch": 256, "tokens": 64, "dim": 128}
NCE = {"op": "info_nce", "dim": 512}


def _find(rows: list[Row], provider: str, where: Row) -> Row | None:
    for row in rows:
        if row.get("provider") == provider and all(row.get(k) == v for k, v in where.items()):
            return row
    return None


def _ratio(rows: list[Row], where: Row, baseline: str, column: str = "both_ms") -> str:
    """How many times less the fused operator needs than a baseline, or why there is no number."""
    ours, theirs = _find(rows, "fused", where), _find(rows, baseline, where)
    for row in (ours, theirs):
        if row is None:
            return "not run"
        if row["status"] != "ok":
            return str(row["status"])
    assert ours is not None and theirs is not None
    return f"{theirs[column] / ours[column]:.2f}x"


def _joined(cells: list[str]) -> str:
    """a / b, or what both say."""
    return cells[0] if len(set(cells)) == 1 else " / ".join(cells)


def _both_dims(rows: list[Row], baseline: str) -> str:
    return _joined([_ratio(rows, AT_256 | {"dim": dim}, baseline) for dim in (128, 256)])


def _shares(rows: list[Row]) -> str:
    row = _find(rows, "fused", AT_256)
    if row is None or "forward_share" not in row:
        return "not run" if row is None else str(row["status"])
    return f"{100 * row['forward_share']:.0f} % / {100 * row['backward_share']:.0f} %"


def _memory(rows: list[Row]) -> str:
    names = ("eager_fp32", "compile_bf16")
    return _joined([_ratio(rows, AT_256, name, "peak_mib") for name in names])


def _largest_batch(rows: list[Row]) -> str:
    wanted = {k: v for k, v in AT_256.items() if k != "batch"}
    batches = [
        row["batch"]
        for row in rows
        if row.get("provider") == "fused"
        and row["status"] == "ok"
        and all(row.get(k) == v for k, v in wanted.items())
    ]
    return str(max(batches)) if batches else "not run"


def _against_the_product(rows: list[Row]) -> str:
    ours = _find(rows, "fused", SHORT_256)
    sizes = {k: SHORT_256[k] for k in ("batch", "tokens", "patches", "dim")}
    product = _find(rows, "bf16", {"op": "flat_product"} | sizes)
    return _joined(
        [
            "not run"
            if row is None
            else f"{row['forward_ms']:.2f} ms"
            if row["status"] == "ok"
            else str(row["status"])
            for row in (ours, product)
        ]
    )


def _half_empty(rows: list[Row]) -> str:
    full, half = (_find(rows, "fused", AT_256 | {"fill": fill}) for fill in (1.0, 0.5))
    if full is None or half is None or "both_ms" not in full or "both_ms" not in half:
        return "not run"
    return f"{full['both_ms'] / half['both_ms']:.2f}x"


MEASURES: tuple[tuple[str, str, Callable[[list[Row]], str]], ...] = (
    ("against eager float32, B = 256", "6x", lambda rows: _ratio(rows, AT_256, "eager_fp32")),
    (
        "against torch.compile, float32 similarity, D = 128",
        "2x",
        lambda rows: _ratio(rows, AT_256, "compile_fp32"),
    ),
    (
        "against torch.compile, bf16 similarity, D = 128 / 256",
        "1.1x / 0.9x",
        lambda rows: _both_dims(rows, "compile_bf16"),
    ),
    (
        "against chunked and checkpointed torch",
        "2.5x",
        lambda rows: _ratio(rows, AT_256, "chunked"),
    ),
    (
        "against chunks with the derivative by hand",
        "-",
        lambda rows: _ratio(rows, AT_256, "chunked_analytic"),
    ),
    (
        "forward pass / the flat product alone, B = 256, T = 64, D = 128",
        "0.27 ms at the peak",
        _against_the_product,
    ),
    ("share of the measured bf16 matrix peak, forward / backward", "40 % / 45 %", _shares),
    ("extra memory against eager / compile, B = 256", "100x / 40x less", _memory),
    ("largest batch on one card, T = 112, D = 128", "4096", _largest_batch),
    ("half-empty reports against full ones", "1.5x", _half_empty),
    (
        "`info_nce_loss` against inf-cl 1.2.1, 65536 x 512",
        "4x",
        lambda rows: _ratio(rows, NCE | {"batch": 65536}, "inf_cl"),
    ),
    (
        "`info_nce_loss` against eager, B >= 16384",
        "1.3x",
        lambda rows: _ratio(rows, NCE | {"batch": 16384}, "eager_bf16"),
    ),
    (
        "max pooling against late-interaction-kernels 0.4.5, B = 256",
        "1.5x",
        lambda rows: _ratio(rows, MAX_256, "late_interaction_kernels"),
    ),
)


def measures(rows: list[Row]) -> list[Row]:
    """One row a line of the README's table: what is wanted and what was measured."""
    return [
        {"measure": name, "wanted": wanted, "measured": compute(rows)}
        for name, wanted, compute in MEASURES
    ]

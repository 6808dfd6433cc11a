"""The table of kernels/README.md, computed from rows of bench_kernels.py and never from memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.gpu_rows import NOT_RUN, commit_of, commits, latest, together

Row = dict[str, Any]
Cell = tuple[str, str]  # a figure or why there is none, and the commits it is of
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


def _is(provider: str, where: Row) -> Callable[[Row], bool]:
    case = where | {"provider": provider}
    return lambda row: all(row.get(k) == v for k, v in case.items())


def _find(rows: list[Row], provider: str, where: Row) -> Row | None:
    return next(filter(_is(provider, where), latest(rows)), None)


def _quotient(rows: list[Row], one: Callable[[Row], bool], other: Callable[[Row], bool],
              column: str) -> Cell:  # fmt: skip
    """How many times less the first of two cases needs than the second, by one commit, or why
    there is no number."""
    ours, theirs = together(rows, one, other)
    for row in (ours, theirs):
        if row is None:
            return NOT_RUN, "-"
        if row["status"] != "ok":
            return str(row["status"]), commits(row)
    assert ours is not None and theirs is not None
    if commit_of(ours) != commit_of(theirs):
        return f"{NOT_RUN} by one commit", commits(ours, theirs)
    return f"{theirs[column] / ours[column]:.2f}x", commits(ours)


def _ratio(rows: list[Row], where: Row, baseline: str, column: str = "both_ms") -> Cell:
    """How many times less the fused operator needs than a baseline."""
    return _quotient(rows, _is("fused", where), _is(baseline, where), column)


def _joined(cells: list[Cell]) -> Cell:
    """a / b, or what both say."""
    return _once([text for text, _ in cells]), _once([commit for _, commit in cells])


def _once(words: list[str]) -> str:
    return words[0] if len(set(words)) == 1 else " / ".join(words)


def _both_dims(rows: list[Row], baseline: str) -> Cell:
    return _joined([_ratio(rows, AT_256 | {"dim": dim}, baseline) for dim in (128, 256)])


def _shares(rows: list[Row]) -> Cell:
    row = _find(rows, "fused", AT_256)
    if row is None or "forward_share" not in row:
        return NOT_RUN if row is None else str(row["status"]), commits(row)
    shares = f"{100 * row['forward_share']:.0f} % / {100 * row['backward_share']:.0f} %"
    return shares, commits(row)


def _memory(rows: list[Row]) -> Cell:
    names = ("eager_fp32", "compile_fp32", "compile_bf16")
    return _joined([_ratio(rows, AT_256, name, "peak_mib") for name in names])


def _largest_batch(rows: list[Row]) -> Cell:
    """With why a larger one has no figure: one that nobody tried is no limit of the card."""
    wanted = {k: v for k, v in AT_256.items() if k != "batch"}
    found = sorted(filter(_is("fused", wanted), latest(rows)), key=lambda row: row["batch"])
    made = [row for row in found if row["status"] == "ok"]
    if not made:
        return NOT_RUN, "-"
    larger = [row for row in found if row["batch"] > made[-1]["batch"]]
    why = "; ".join(f"{row['batch']}: {row['status']}" for row in larger)
    return str(made[-1]["batch"]) + (f" ({why})" if why else ""), commits(made[-1])


def _against_the_product(rows: list[Row]) -> Cell:
    ours = _find(rows, "fused", SHORT_256)
    sizes = {k: SHORT_256[k] for k in ("batch", "tokens", "patches", "dim")}
    product = _find(rows, "bf16", {"op": "flat_product"} | sizes)
    return _joined([(_forward(row), commits(row)) for row in (ours, product)])


def _forward(row: Row | None) -> str:
    if row is None:
        return NOT_RUN
    return f"{row['forward_ms']:.2f} ms" if row["status"] == "ok" else str(row["status"])


def _half_empty(rows: list[Row]) -> Cell:
    half, full = (_is("fused", AT_256 | {"fill": fill}) for fill in (0.5, 1.0))
    return _quotient(rows, half, full, "both_ms")


MEASURES: tuple[tuple[str, str, Callable[[list[Row]], Cell]], ...] = (
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
    (
        "extra memory against eager / torch.compile with float32 / bf16 similarity, B = 256",
        "100x / 40x / 40x less",
        _memory,
    ),
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
    """One row a line of the README's table: what is wanted, what was measured, of which commit.

    rows: of one card, oldest first
    """
    made = [(name, wanted, *compute(rows)) for name, wanted, compute in MEASURES]
    return [
        {"measure": name, "wanted": wanted, "measured": text, "commit": commit}
        for name, wanted, text, commit in made
    ]

"""Which tile map each pair-score kernel uses, by size, element and shared memory: a fixed table.

A table and not an autotuner: nothing is timed inside a training step, whatever lengths come.
benchmarks/bench_kernels.py --tune times its lines for attention in bf16 on the card at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from mlip.kernels._chip import SHARED_MEMORY, Chip

# the memory law of the README: beside unit copies and scores a call may take
# min(20 bytes a pair of row and image, WORKSPACE_CAP_BYTES) + WORKSPACE_SLACK_BYTES, and a backward
# pass by products a block of gradient_rows
WORKSPACE_CAP_BYTES = 2**30
WORKSPACE_SLACK_BYTES = 2**26
WORKSPACE_RESERVE_BYTES = 2**22  # row index, masks and the loss's own temporaries
# where the float32 gradient of all patches passes LARGE_GRADIENT_BYTES, chunks must still be long
# enough to fill the chip; what the law leaves then comes from the gradients not yet handed out
LARGE_GRADIENT_BYTES = 2**29
LARGE_FLOOR_BYTES = 2**28
SMALL_FLOOR_BYTES = 2**25
CONTEXT_BUDGET_BYTES = 2**27
# a block of similarity gradients: `gradient_rows`
GRADIENT_BYTES = 2**29
GRADIENT_CAP_BYTES = 2**30
GRADIENT_ROWS = 1024
GRADIENT_UNIT = 128
MAX_DIM = 256
MAX_PATCHES = 2**16  # two digits of 8 bits number them (max pooling); sums of e^75 stay in range
ROW_TAIL = 128  # rows behind the packed ones: the longest row tile of the table
SHARED_MEMORY_SLACK = 8192  # barriers, reductions and index staging beside the tiles


@dataclass(frozen=True)
class Tiling:
    """A kernel's tile map: rows, up to three patch segments, repeated over an image."""

    block_r: int
    segments: tuple[int, int, int]
    tiles: int
    warps: int
    stages: int

    def keywords(self) -> dict[str, int]:
        seg0, seg1, seg2 = self.segments
        return {
            "BLOCK_R": self.block_r,
            "SEG0": seg0,
            "SEG1": seg1,
            "SEG2": seg2,
            "TILES": self.tiles,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def padded_patches(patches: int) -> int:
    """Patches of the normalised copy: the next multiple of 16, the shortest tensor-core side."""
    return (patches + 15) // 16 * 16


def block_dim(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


# shared memory of the row kernels' backward pass, which holds a text's entities in float32, by
# bytes a token element, padded D and K: what compilation reported
# (tests/kernels/test_triton_compile.py); three tf32 products of float32 tokens hold every operand
# twice
ROW_KERNEL_BYTES = {
    (2, 128): {16: 41984, 32: 59904, 64: 90624, 128: 172032},
    (2, 256): {16: 82944, 32: 117248, 64: 180736},
    (4, 128): {16: 51200, 64: 180224},
    (4, 256): {16: 100352},
}


def most_entities(dim: int, size: int, limit: int) -> int:
    """Entities a text that fit on chip, by padded D, token element and a block's shared memory."""
    sizes = ROW_KERNEL_BYTES[size, 128 if dim <= 128 else 256]
    # no max(default=): torch.compile cannot trace it, and the losses are to be one graph
    return max([0, *(count for count, needed in sizes.items() if needed <= limit)])


Candidate = tuple[int, tuple[int, int, int], int]  # rows, segments, warps


@dataclass(frozen=True)
class Choice:
    """Tile maps of one kernel: of `best` that fit, the one that pads an image least (the earlier
    one within 4 %); where none fits, the first of `small` that does."""

    best: list[Candidate]
    small: list[Candidate]
    stages: int = 2


# A stationary side shorter than 64 rows or patches asks more of the L2 cache than it delivers
# (README, tile maps), so those lines are for small shared memory only. What the lines of `best`
# keep on the stack in bfloat16 is bounded in tests/kernels/test_triton_compile.py: four words on
# sm_90, none in most.
SMALL: list[Candidate] = [
    (64, (64, 0, 0), 8),
    (64, (32, 0, 0), 8),
    (32, (32, 0, 0), 8),
    (32, (16, 0, 0), 4),
    (16, (16, 0, 0), 4),
]
# A backward pass that adds the gradient of patches up in registers has one segment: with three, an
# H200 gave illegal addresses or other bits from run to run (README, tile maps).
TABLE: dict[tuple[str, int], Choice] = {
    ("forward", 128): Choice([(128, (64, 0, 0), 8)], SMALL),
    ("forward", 256): Choice([(128, (64, 0, 0), 8)], SMALL),
    ("backward_rows", 128): Choice(
        [(128, (128, 64, 16), 8), (128, (128, 64, 0), 8), (128, (64, 32, 16), 8)]
        + [(128, (128, 0, 0), 8), (128, (64, 0, 0), 8)],
        SMALL,
    ),
    ("backward_patches", 128): Choice([(128, (128, 0, 0), 8), (128, (64, 0, 0), 8)], SMALL),
    ("backward_patches", 256): Choice([(128, (64, 0, 0), 8)], SMALL),  # of max pooling
    ("gradient", 256): Choice([(128, (64, 0, 0), 8)], SMALL),
}
# (pooling or "", kernel, dim) where the general line spills: mma.sync of sm_80 holds its operands
# in registers, and a one-hot product is compiled otherwise than a softmax
OVERRIDES_80: dict[tuple[str, str, int], Choice] = {
    ("", "backward_rows", 128): Choice([(128, (32, 0, 0), 8)], SMALL),
    ("", "backward_patches", 128): Choice([(128, (64, 0, 0), 8)], SMALL),
    ("", "gradient", 256): Choice([(64, (64, 0, 0), 8), (64, (32, 0, 0), 8)], SMALL[2:]),
    **{
        ("context", kind, 128): Choice([(64, (64, 0, 0), 8)], SMALL[1:])
        for kind in ("forward", "turn", "backward_rows", "backward_patches")
    },
    ("context", "forward", 256): Choice([(64, (32, 0, 0), 8)], SMALL[2:]),
    ("context", "backward_rows", 256): Choice([(64, (32, 0, 0), 8)], SMALL[2:], stages=1),
}
# where products add up in tensor memory: of several segments each has its columns there, twice;
# and Triton 3.9 streams a context's t in one stage more than 3.6, which has no room
OVERRIDES_TENSOR: dict[tuple[str, str, int], Choice] = {
    ("", "backward_rows", 128): Choice([(128, (64, 0, 0), 4)], SMALL),
    ("context", "backward_patches", 128): Choice([(64, (64, 0, 0), 8)], SMALL[1:]),
    ("context", "backward_patches", 256): Choice([(64, (64, 0, 0), 8)], SMALL[1:], stages=1),
}
# lines that only benchmarks/bench_kernels.py --tune tries: no count of instructions says which wins
ALTERNATIVES: dict[tuple[str, int], list[Candidate]] = {
    ("forward", 128): [(128, (128, 16, 64), 8)],
    ("forward", 256): [(64, (128, 16, 64), 8), (128, (128, 0, 0), 8)],
    ("backward_rows", 128): [(64, (128, 64, 16), 4), (64, (64, 32, 16), 4)],
    ("backward_patches", 128): [(64, (64, 0, 0), 4)],
    ("gradient", 256): [(64, (128, 0, 0), 4), (64, (64, 0, 0), 4)],
}
# gathers one patch for every row: no patch is held, any chip has room
MAX_ROWS = Choice([], [(64, (16, 0, 0), 8)])
CONTEXT: dict[tuple[str, int], Choice] = {
    ("forward", 128): Choice([(128, (64, 0, 0), 8)], SMALL),
    ("forward", 256): Choice([(64, (32, 0, 0), 4)], SMALL[2:]),
    ("turn", 128): Choice([(128, (64, 0, 0), 8)], SMALL),
    ("turn", 256): Choice([(64, (64, 0, 0), 8)], SMALL[1:]),
    ("backward_rows", 128): Choice([(128, (64, 0, 0), 8)], SMALL),
    ("backward_rows", 256): Choice([(64, (32, 0, 0), 4)], SMALL[2:], stages=1),
    ("backward_patches", 128): Choice([(128, (64, 0, 0), 8)], SMALL),
    ("backward_patches", 256): Choice([(64, (64, 0, 0), 8)], SMALL[1:]),
}
# three tf32 products a dot hold every operand twice: small tiles, correct first
FLOAT32: dict[tuple[str, int], Choice] = {
    ("forward", 128): Choice([(64, (32, 0, 0), 4)], SMALL[3:]),
    ("forward", 256): Choice([(64, (16, 0, 0), 8)], SMALL[4:]),
}
# kernel -> tile map in place of the table's, for the candidates of bench_kernels --tune
FORCED: dict[str, Tiling] = {}
FLOAT32_OTHERS = {128: Choice([], SMALL[4:]), 256: Choice([(16, (16, 0, 0), 8)], SMALL[4:])}


def shared_bytes(kind: str, block_r: int, span: int, dim: int, size: int, stages: int) -> int:
    """Shared memory of a tiling: its stationary side once, its streamed side once a stage."""
    rows, patches = block_r * dim * size, span * dim * size
    if kind == "resident":
        # the loops with and without a row maximum share all but one stage
        return patches + (stages + 1) * rows
    if kind in ("gradient", "backward_patches"):
        return patches + stages * rows + block_r * min(span, 128) * size
    return rows + stages * patches


def _resident(patches: int, dim: int, limit: int, pooling: str) -> Tiling | None:
    """All patches of an image on chip in at most three power-of-two segments, or None."""
    if (pooling, dim > 128) == ("max", True) and padded_patches(patches) not in (16, 32, 64, 128):
        return None  # never seen right on a card: TABLE
    segments: list[int] = []
    left = padded_patches(patches)
    while left > 0 and len(segments) < 3:
        part = next(size for size in (128, 64, 32, 16) if size <= left)
        segments.append(part)
        left -= part
    if left > 0:
        return None
    if shared_bytes("resident", 64, sum(segments), dim, 2, 2) + SHARED_MEMORY_SLACK > limit:
        return None
    if len(segments) == 3:  # the short one in the middle: two words fewer on the stack at D = 256
        segments = [segments[0], segments[2], segments[1]]
    seg0, seg1, seg2 = (segments + [0, 0])[:3]
    return Tiling(64, (seg0, seg1, seg2), 1, 4, 2)


def _choice(kind: str, width: int, size: int, chip: Chip, pooling: str) -> Choice:
    if (pooling, kind) == ("max", "backward_rows"):
        return MAX_ROWS
    if size == 4:
        return FLOAT32.get((kind, width), FLOAT32_OTHERS[width])
    overrides = OVERRIDES_80 if chip.shared < SHARED_MEMORY[9, 0] else {}
    if chip.has_tensor_memory:
        overrides = OVERRIDES_TENSOR
    if (pooling, kind, width) in overrides:
        return overrides[pooling, kind, width]
    if pooling == "context":
        return CONTEXT[kind, width]
    return overrides.get(("", kind, width), TABLE[kind, width])


def _fitting(
    kind: str, patches: int, dim: int, size: int, chip: Chip, pooling: str,
    others: Sequence[Candidate] = (),
) -> list[tuple[bool, Tiling]]:  # fmt: skip
    """The lines of the table that fit, in its order, and whether each is one of `small`."""
    choice = _choice(kind, 128 if dim <= 128 else 256, size, chip, pooling)
    found = []
    lines = [(False, c) for c in choice.best] + [(True, c) for c in (*choice.small, *others)]
    for is_small, (block_r, segments, warps) in lines:
        span = sum(segments)
        # a context's backward pass streams t beside the rows, in as many stages
        streamed = 0
        if kind.startswith("backward") and pooling == "context":
            streamed = 2 * block_r * dim * size
        needed = shared_bytes(kind, block_r, span, dim, size, 2) + streamed
        if needed + SHARED_MEMORY_SLACK > chip.shared and choice is not MAX_ROWS:
            continue
        tiles = -(-padded_patches(patches) // span)
        # TILES == 1 means resident to the forward kernel: a short image takes two short tiles
        if kind == "forward" and tiles == 1 and segments[1] == 0:
            tiles = 2
        if kind == "forward" and tiles > 1 and segments[1] > 0:
            continue  # streamed a segment at a time
        found.append((is_small, Tiling(block_r, segments, tiles, warps, choice.stages)))
    return found


def fitting_tilings(
    kind: str, patches: int, dim: int, size: int, chip: Chip, pooling: str = "attention"
) -> list[Tiling]:
    """Every tile map worth timing on this chip, those that choose_tiling could use first."""
    others = []
    if size == 2 and pooling == "attention":
        others = ALTERNATIVES.get((kind, 128 if dim <= 128 else 256), [])
    lines = _fitting(kind, patches, dim, size, chip, pooling, others)
    found = [tiling for _, tiling in lines]
    if kind == "forward" and size == 2 and pooling != "context":
        resident = _resident(patches, dim, chip.shared, pooling)
        found = found if resident is None else [resident, *found]
    return found


@functools.cache
def choose_tiling(
    kind: str, patches: int, dim: int, size: int, chip: Chip, pooling: str = "attention"
) -> Tiling:
    """The tiling of a kernel for a padded dim, an element size in bytes and a chip."""
    if kind in FORCED:
        return FORCED[kind]
    if kind == "forward" and size == 2 and pooling != "context":
        resident = _resident(patches, dim, chip.shared, pooling)
        if resident is not None:
            return resident
    best: tuple[float, Tiling] | None = None
    for is_small, tiling in _fitting(kind, patches, dim, size, chip, pooling):
        if is_small and best is not None:
            break
        waste = tiling.tiles * sum(tiling.segments) / patches
        if best is None or waste < 0.96 * best[0]:
            best = (waste, tiling)
    if best is None:
        raise ValueError(
            f"no tiling of {kind} fits D={dim} into {chip.shared} bytes of shared memory; "
            'pass impl="torch"'
        )
    return best[1]


@dataclass(frozen=True)
class Problem:
    """Sizes and options of one call."""

    images: int
    texts: int
    rows_a_text: int
    patches: int
    dim: int
    size: int
    pooling: str
    aggregation: str

    @property
    def padded(self) -> int:
        return padded_patches(self.patches)

    def stride(self, texts: int) -> int:
        """Row stride of [M, rows of a chunk] buffers: a multiple of 16, so that loads vectorise."""
        return (max(1, texts * self.rows_a_text) + 15) // 16 * 16


def _rows_gradient(p: Problem, texts: int) -> int:
    return 4 * p.dim * p.rows_a_text * texts


def workspace_bytes(p: Problem, is_whole: bool = False) -> int:
    """What the law leaves for chunks of texts after the float32 buffer of d patches.

    is_whole: the gradient of all rows is held at once, because ranks exchange it
    """
    rows = p.texts * p.rows_a_text
    law = min(20 * p.images * rows, WORKSPACE_CAP_BYTES) + WORKSPACE_SLACK_BYTES
    # row index, weights and their gradient, the bias of patches
    law -= WORKSPACE_RESERVE_BYTES + 16 * rows + 4 * p.images * p.padded
    gradients = 4 * p.dim * p.images * p.padded + (_rows_gradient(p, p.texts) if is_whole else 0)
    is_large = gradients > LARGE_GRADIENT_BYTES
    return max(law - gradients, LARGE_FLOOR_BYTES if is_large else SMALL_FLOOR_BYTES)


def chunk_bytes(p: Problem, texts: int, is_whole: bool = False) -> int:
    """Of a chunk of texts: r and softmax statistic of its pairs, g (which products have a block of
    rows at a time), a context's h and t, d rows."""
    each = 8 if takes_products(p) else 12
    each += 4 + p.size * p.dim if p.pooling == "context" else 0
    rows = 0 if is_whole else _rows_gradient(p, texts)
    return each * p.images * p.stride(texts) + rows


def takes_products(p: Problem) -> bool:
    """Whether the backward pass is that of products_triton_kernels.py."""
    return p.pooling == "attention" and p.size == 2 and p.dim > 128


def gradient_rows(p: Problem, texts: int) -> int:
    """Rows in a block of similarity gradients, of chunks of at most so many texts: as many as
    GRADIENT_BYTES hold, at least GRADIENT_ROWS (fewer would spend their time on adding to the
    gradient of patches), within GRADIENT_CAP_BYTES."""
    row = p.size * p.images * p.padded
    most = min(max(GRADIENT_BYTES // row, GRADIENT_ROWS), GRADIENT_CAP_BYTES // row)
    most = max(GRADIENT_UNIT, most // GRADIENT_UNIT * GRADIENT_UNIT)
    rows = max(1, texts * p.rows_a_text)
    # blocks of one length: the library multiplies what is not there in the last one too
    blocks = -(-rows // most)
    return -(-rows // (blocks * GRADIENT_UNIT)) * GRADIENT_UNIT


def _chunk_budget(p: Problem, is_whole: bool) -> int:
    budget = workspace_bytes(p, is_whole)
    return min(budget * 3 // 4, CONTEXT_BUDGET_BYTES) if p.pooling == "context" else budget


def text_chunks(p: Problem, is_whole: bool = False) -> list[tuple[int, int]]:
    """Texts in ranges whose statistics fit the workspace, beside some room for partial sums."""
    budget = _chunk_budget(p, is_whole)
    if chunk_bytes(p, p.texts, is_whole) <= budget:
        return [(0, p.texts)]
    step = max(1, budget // chunk_bytes(p, 1, is_whole))
    return [(first, min(first + step, p.texts)) for first in range(0, p.texts, step)]


def is_kept(p: Problem) -> bool:
    """Whether the forward pass leaves r and the softmax statistics to the backward pass.

    The context's backward pass works in chunks of its own and makes them again.
    """
    # without the list of chunks: torch.compile asks this for batches of any size
    return p.pooling != "context" and chunk_bytes(p, p.texts) <= _chunk_budget(p, False)

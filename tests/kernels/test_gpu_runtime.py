"""The kernels on an NVIDIA GPU: repeatable, within their memory law, never synchronising.

Run by `make gpu-check`. Also CUDA graphs, streams, NCCL, torch.compile and 64-bit offsets.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlip.kernels import _distributed
from mlip.kernels.info_nce import info_nce_loss
from mlip.kernels.token_knowledge_patch import (
    TokenKnowledgePatchLoss,
    contrastive_loss_from_scores,
    tiling,
    token_knowledge_patch_loss,
    token_knowledge_patch_scores,
)
from tests.kernels.gpu_inputs import FEATURES, training_inputs
from tests.kernels.oracle import relative_error
from tests.kernels.test_info_nce import memory_law

pytestmark = pytest.mark.gpu


def repeats_are_bit_equal(pooling: str, patches: int, dim: int, repeats: int) -> None:
    made = training_inputs(48, 40, patches, dim)
    alpha = torch.tensor(10.0, device="cuda", requires_grad=True)
    leaves_ = [made[n] for n in FEATURES] + ([] if pooling == "max" else [alpha])
    first: list[Tensor] | None = None
    for _ in range(repeats):
        value = token_knowledge_patch_loss(
            **made, logit_scale=10.0, pooling=pooling, attention_scale=alpha
        )
        now = [value, *torch.autograd.grad(value, leaves_)]
        first = now if first is None else first
        assert all(torch.equal(a, b) for a, b in zip(now, first, strict=True))


@pytest.mark.parametrize("pooling", ["attention", "max", "context"])
@pytest.mark.parametrize(("patches", "dim"), [(100, 128), (196, 128), (196, 256)])
def test_a_hundred_repeats_are_bit_equal(pooling: str, patches: int, dim: int) -> None:
    repeats_are_bit_equal(pooling, patches, dim, 100)


# one number of patches for every map of segments, each a test: gpu_check shares tests out, and one
# that compiles a hundred kernels would be as long as a whole share
MAPPED = (16, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 240, 576)


@pytest.mark.parametrize("pooling", ["attention", "max", "context"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("patches", MAPPED)
def test_every_tile_map_repeats_bit_for_bit(pooling: str, dim: int, patches: int) -> None:
    """A map that the compiler gets wrong shows as other bits, or as an illegal address."""
    repeats_are_bit_equal(pooling, patches, dim, 8)


def test_info_nce_repeats_bit_for_bit() -> None:
    g = torch.Generator(device="cuda").manual_seed(7)
    x, y = (
        F.normalize(torch.randn(3000, 256, generator=g, device="cuda"), dim=-1)
        .bfloat16()
        .requires_grad_()
        for _ in range(2)
    )
    runs = []
    for _ in range(20):
        value = info_nce_loss(x, y, 50.0)
        runs.append([value, *torch.autograd.grad(value, [x, y])])
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("batch", [128, 384])
def test_memory_follows_its_law(batch: int) -> None:
    """Beside inputs and gradients: one unit copy, 8 N^2, min(20 N^2 J, 1 GiB) and 64 MiB."""
    tokens, patches, dim = 112, 196, 128
    made = training_inputs(batch, tokens, patches, dim, fill=2.0)

    def step() -> None:
        value = token_knowledge_patch_loss(**made, logit_scale=10.0)
        value.backward()

    step()
    for name in FEATURES:
        made[name].grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    rows = tokens + 8
    copies = 2 * dim * batch * (rows + tiling.padded_patches(patches))
    law = 2 * copies + 8 * batch**2 + min(20 * batch**2 * rows, 2**30) + 64 * 2**20
    assert used <= law, (used, law)


def test_info_nce_needs_memory_in_proportion_to_the_batch() -> None:
    """Oracle: the law at the top of info_nce/triton_kernels.py."""
    dim, processors = 256, torch.cuda.get_device_properties(0).multi_processor_count
    for count in (8192, 32768):
        x, y = (
            F.normalize(torch.randn(count, dim, device="cuda"), dim=-1).bfloat16().requires_grad_()
            for _ in range(2)
        )
        info_nce_loss(x, y, 20.0).backward()  # cuBLAS takes its own workspace once
        x.grad = y.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        info_nce_loss(x, y, 20.0).backward()
        torch.cuda.synchronize()
        used = torch.cuda.max_memory_allocated() - before
        law = memory_law(count, dim, processors)
        assert used <= law, (count, used, law)
        del x, y


@pytest.mark.parametrize("learned", [False, True])
def test_nothing_synchronises(learned: bool) -> None:
    made = training_inputs(16, 20, 49, 64)
    ids = torch.arange(16, device="cuda") // 2
    module = TokenKnowledgePatchLoss(learn_scales=learned).cuda()
    mask = torch.ones(16, 49, dtype=torch.bool, device="cuda")
    module(**made, patch_mask=mask, pair_ids=ids).backward()  # compiles, allocates
    x, y = (F.normalize(made[n][:, 0], dim=-1) for n in ("patches", "tokens"))
    info_nce_loss(x, y, 10.0, pair_ids=ids).backward()
    token_knowledge_patch_loss(**made, logit_scale=10.0, aggregation="lse").backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(**made, patch_mask=mask, pair_ids=ids).backward()
        x, y = (F.normalize(made[n][:, 0], dim=-1) for n in ("patches", "tokens"))
        info_nce_loss(x, y, 10.0, pair_ids=ids).backward()
        # scales as host numbers are filled in on the device
        token_knowledge_patch_loss(**made, logit_scale=10.0, aggregation="lse").backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_forward_and_backward() -> None:
    made = training_inputs(16, 20, 49, 64)
    leaves_ = [made[n] for n in FEATURES]

    def step() -> tuple[Tensor, ...]:
        value = token_knowledge_patch_loss(**made, logit_scale=10.0)
        return value, *torch.autograd.grad(value, leaves_)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # the inputs are being made there
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        made["tokens"].copy_(torch.randn_like(made["tokens"]))
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


def test_a_side_stream_gives_the_same_bits() -> None:
    made = training_inputs(16, 20, 49, 64)
    leaves_ = [made[n] for n in FEATURES]

    def step() -> list[Tensor]:
        value = token_knowledge_patch_loss(**made, logit_scale=10.0)
        return [value, *torch.autograd.grad(value, leaves_)]

    want = step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = step()
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_one_nccl_rank_gives_what_no_group_gives() -> None:
    """The collectives of several ranks run too, on a group of one: NCCL takes their arguments."""
    if not torch.distributed.is_nccl_available():
        pytest.skip("this torch build has no NCCL")
    torch.distributed.init_process_group(
        "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        group = torch.distributed.group.WORLD
        made = training_inputs(8, 20, 49, 64)
        x, y = (F.normalize(made[n][:, 0].detach(), dim=-1) for n in ("patches", "tokens"))
        for call in (
            lambda g: token_knowledge_patch_loss(**made, logit_scale=10.0, group=g),
            lambda g: info_nce_loss(x, y, 10.0, group=g),
        ):
            assert torch.equal(call(group), call(None))
        ids = torch.arange(8, device="cuda")
        for rows in (made["tokens"].detach(), made["token_weights"], ids):
            assert torch.equal(_distributed.gather_over_ranks(rows, group, [8]), rows)
        total = _distributed.reduce_over_ranks(made["token_weights"], group, [8])
        assert torch.equal(total, made["token_weights"])
    finally:
        torch.distributed.destroy_process_group()


def test_torch_compile_keeps_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # torch.compile cannot trace the poisoned torch.empty of tests/conftest.py
    made = training_inputs(16, 20, 49, 64)
    leaves_ = [made[n] for n in FEATURES]

    def run(patches: Tensor, tokens: Tensor, knowledge: Tensor) -> Tensor:
        rest = made | {"patches": patches, "tokens": tokens, "knowledge": knowledge}
        scores = token_knowledge_patch_scores(**rest)
        return contrastive_loss_from_scores(scores, logit_scale=10.0) * 2.0

    truth = run(*leaves_)
    value = torch.compile(run, fullgraph=True)(*leaves_)
    assert relative_error(value, truth) <= 1e-6
    pairs = zip(
        torch.autograd.grad(value, leaves_), torch.autograd.grad(truth, leaves_), strict=True
    )
    for got, want in pairs:
        assert relative_error(got, want) <= 1e-3


def test_offsets_beyond_32_bits_are_right() -> None:
    """Two images whose rows lie more than 2^31 elements apart, in a storage of 4.3 GB."""
    dim, patches = 64, 49
    far = 2**31 + 64
    storage = torch.zeros(far + patches * dim, dtype=torch.bfloat16, device="cuda")
    apart = torch.as_strided(storage, (2, patches, dim), (far, dim, 1))
    with torch.no_grad():
        apart.copy_(torch.randn(2, patches, dim, device="cuda"))
    tokens = torch.randn(3, 8, dim, device="cuda", dtype=torch.bfloat16)
    value = token_knowledge_patch_scores(apart, tokens)
    assert torch.equal(value, token_knowledge_patch_scores(apart.contiguous(), tokens))


def test_statistics_beyond_32_bits_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """M x rows above 2^31: the corner blocks equal those of small calls."""
    monkeypatch.setattr(tiling, "WORKSPACE_CAP_BYTES", 2**38)
    batch, tokens = 4352, 128
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    patches = torch.randn(batch, 16, 32, device="cuda", dtype=torch.bfloat16).requires_grad_()
    text = torch.randn(batch, tokens, 32, device="cuda", dtype=torch.bfloat16)
    value = token_knowledge_patch_scores(patches, text)
    corner = token_knowledge_patch_scores(patches[-3:], text[-3:])
    assert torch.equal(value[-3:, -3:], corner)
    weights = torch.zeros_like(value)
    weights[-3:, -3:] = 1.0
    (got,) = torch.autograd.grad((value * weights).sum(), [patches])
    (want,) = torch.autograd.grad(corner.sum(), [patches])
    assert relative_error(got[-3:], want[-3:]) <= 1e-3
    assert torch.count_nonzero(got[:-3]) == 0


def test_changing_lengths_compile_nothing_new() -> None:
    from mlip.kernels.token_knowledge_patch.forward_triton_kernels import _pair_fwd_kernel

    patches = torch.randn(4, 49, 64, device="cuda", dtype=torch.bfloat16)

    def compiled() -> int:
        return sum(len(cache[0]) for cache in _pair_fwd_kernel.device_caches.values())

    def run(tokens: int) -> None:
        text = torch.randn(4, tokens, 64, device="cuda", dtype=torch.bfloat16)
        token_knowledge_patch_scores(patches, text)

    for tokens in (16, 17, 33):
        run(tokens)
    before = compiled()
    for tokens in range(18, 60, 3):
        run(tokens)
    # integers divisible by 16 or equal to 1 are specialised by Triton: a handful, not one a length
    assert compiled() - before <= 3

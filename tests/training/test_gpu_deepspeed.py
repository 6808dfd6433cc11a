"""The whole run on one NVIDIA GPU: launcher, DeepSpeed with NCCL, resume, repeats, xformers.

Run by `python3 benchmarks/gpu_check.py --part deepspeed`. One rank, so the plain engine and
DeepSpeed compute the same step but for the order of sums: ZeRO keeps convolution weights in another
memory layout, and sums the gradient norm in flat parts. Runs are small (64 phantom studies), about
20 s each, most of it imports.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from mlip.encoders.attention import attention, require_usable
from mlip.training import checkpoint
from tests.faults import jobs
from tests.rank_farm import free_port
from tests.small_run import small_run
from tests.temporary import shared_folder

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
STEPS, EVERY, KILLED_IN = 50, 20, 33
SETTINGS = (
    f"train.max_steps={STEPS}",
    f"train.checkpoint_steps={EVERY}",
    "batch.global_pairs=16",
    "train.lr=0.01",  # at the default nothing moves in fifty steps, and two engines agree by that
    "train.warmup_steps=5",
    "train.precision=bf16",
    "run.deterministic=true",
    "run.threads=4",
    "loss.category.prototypes=8",
    "evaluate.bootstrap=10",
)
ZERO_2 = ("train.engine=deepspeed", "train.zero_stage=2")
PLAIN = ("train.engine=plain", "train.zero_stage=0")
SHORT = ("train.max_steps=10", "train.precision=fp32", "train.lr=0.001")


def _start(folder: Path, *settings: str, fault: str | None = None) -> Any:
    """train.py under the `deepspeed` launcher, or under torchrun where it is not installed."""
    if HAS_DEEPSPEED:
        # the module behind the `deepspeed` command, which may lie outside the path
        launcher = ["deepspeed.launcher.runner", "--num_gpus", "1", "--log_level", "error"]
    else:
        launcher = ["torch.distributed.run", "--nproc_per_node", "1"]
    command = [sys.executable, "-m", *launcher, "--master_port", str(free_port()), "train.py"]
    command += [s for s in small_run().settings if not s.startswith("run.dir")]
    environment = {k: v for k, v in os.environ.items() if k not in ("FAULT", "DS_ACCELERATOR")}
    environment["NVIDIA_TF32_OVERRIDE"] = "0"  # float32 products that are float32
    environment |= {"FAULT": fault} if fault else {}
    return subprocess.run(
        [*command, *SETTINGS, f"run.dir={folder}", *settings],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def _finish(folder: Path, *settings: str) -> Path:
    done = _start(folder, *settings)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@cache
def _whole(*settings: str) -> Path:
    """A run that nothing happened to, made once for all tests."""
    return _finish(shared_folder("gpu-run"), *settings)


def _meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meta.json").read_text())


def _engine() -> tuple[str, ...]:
    return ZERO_2 if HAS_DEEPSPEED else PLAIN


def test_fifty_steps_through_the_launcher_end_with_a_page() -> None:
    folder = _whole(*_engine())
    assert sorted(jobs.steps(folder)) == list(range(1, STEPS + 1))
    meta = _meta(folder)
    assert meta["engine"] == ("deepspeed" if HAS_DEEPSPEED else "plain")
    assert meta["determinism"].startswith("D2"), meta["determinism"]
    losses = [numbers[0] for numbers in jobs.steps(folder).values()]
    assert all(loss is not None for loss in losses)  # None = not finite
    assert (folder / "report.html").is_file()


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Oracle: the run that nothing happened to, and its repetition to the bit by the way."""
    whole = _whole(*_engine())
    killed = _start(tmp_path, *_engine(), fault=f"kill@0:{KILLED_IN}:backward")
    # the step before was done, and its numbers had not been read yet
    assert killed.returncode != 0 and max(jobs.steps(tmp_path)) == KILLED_IN - 1
    assert [p.name for p in checkpoint.checkpoints_of(tmp_path)] == [f"step_{EVERY:08d}"]
    _finish(tmp_path, *_engine())
    assert [event["step"] for event in jobs.events(tmp_path, "started")] == [0, EVERY]
    assert len(jobs.events(tmp_path, "fault")) == 1
    assert jobs.steps(tmp_path) == jobs.steps(whole)
    one, other = (
        checkpoint.read(checkpoint.checkpoints_of(folder)[0]).training
        for folder in (whole, tmp_path)
    )
    for name, tensor in one.parameters.items():
        assert torch.equal(tensor, other.parameters[name]), name


def test_a_bad_step_is_skipped_and_the_run_goes_on(tmp_path: Path) -> None:
    done = _start(tmp_path, *_engine(), "train.max_steps=10", fault="nan@0:4:backward")
    assert done.returncode == 0, done.stderr[-4000:]
    (skipped,) = jobs.events(tmp_path, "skipped")
    assert skipped["step"] == 5 and len(skipped["manifest_rows"]) == 16
    steps = jobs.steps(tmp_path)
    assert sorted(steps) == list(range(1, 11)) and steps[5][1] is None
    assert all(steps[step][1] is not None for step in steps if step != 5)
    state = checkpoint.read(checkpoint.checkpoints_of(tmp_path)[0])
    assert state.state["skipped_steps"] == 1 and state.state["optimizer_steps"] == 9


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_the_plain_engine_repeats_to_the_bit(tmp_path: Path, pipeline: str) -> None:
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali", reason="nvidia.dali is not installed")
    settings = (*PLAIN, "train.max_steps=10", f"data.pipeline={pipeline}")
    assert jobs.steps(_finish(tmp_path, *settings)) == jobs.steps(_whole(*settings))


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
def test_deepspeed_and_the_plain_engine_agree() -> None:
    """In float32 without TF32; bounds are a hundredfold of what a CPU showed, rounded.

    There the first step's loss and gradient norm were 6e-8 and 1e-6 apart, those of ten steps
    4e-7 and 4e-5 at most. What AdamW makes of a difference grows: 4e-4 and 3 % at train.lr=0.01.
    """
    zero, plain = (jobs.steps(_whole(*engine, *SHORT)) for engine in (ZERO_2, PLAIN))
    assert _meta(_whole(*ZERO_2, *SHORT))["engine"] == "deepspeed"
    for step in plain:
        loss, norm = (1e-5, 1e-4) if step == 1 else (1e-4, 1e-2)
        assert zero[step][0] == pytest.approx(plain[step][0], rel=loss), step
        assert zero[step][1] == pytest.approx(plain[step][1], rel=norm), step


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
def test_the_plain_engine_goes_on_from_deepspeeds_checkpoint(tmp_path: Path) -> None:
    """Oracle: DeepSpeed's own next steps, in bf16 (on a CPU 1e-5 of the loss, then 1e-4)."""
    whole = _whole(*ZERO_2)
    killed = _start(tmp_path, *ZERO_2, fault=f"kill@0:{EVERY}:load")
    assert killed.returncode != 0
    _finish(tmp_path, *PLAIN)
    plain, zero = jobs.steps(tmp_path), jobs.steps(whole)
    assert plain[EVERY + 1][0] == pytest.approx(zero[EVERY + 1][0], rel=1e-3)
    for step in range(EVERY + 1, EVERY + 6):
        assert plain[step][0] == pytest.approx(zero[step][0], rel=2e-2), step


def _usable_xformers() -> None:
    """Skips with xformers' own reason where its kernels cannot run here."""
    pytest.importorskip("xformers", reason="xformers is not installed")
    try:
        require_usable("xformers")
    except ValueError as error:
        pytest.skip(str(error))


def test_which_operators_of_xformers_can_run_here_is_printed() -> None:
    """For the record: a build for another CUDA loads no binary kernels, torch's own remain."""
    pytest.importorskip("xformers", reason="xformers is not installed")
    from xformers.ops import fmha

    for way in ("ALL_FW_OPS", "ALL_BW_OPS"):
        for operator in getattr(fmha, way, ()):
            print(f"{way} {operator.NAME}: {'available' if operator.is_available() else 'not'}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_masked", [False, True])
def test_xformers_attention_is_sdpas(dtype: torch.dtype, is_masked: bool) -> None:
    """Oracle: the written-out formula in float64; bound: twice torch SDPA's own error to it.

    Shapes of BERT at 77 tokens, no multiple of the 8 that the kernels want of a bias, and of ViT.
    """
    _usable_xformers()
    g = torch.Generator(device="cuda").manual_seed(0)
    tokens = 77 if is_masked else 197
    inputs = [torch.randn(4, 12, tokens, 64, generator=g, device="cuda") for _ in range(4)]
    inputs = [x.to(dtype) for x in inputs]
    mask = None
    if is_masked:
        lengths = torch.tensor([77, 40, 9, 1], device="cuda")
        mask = (torch.arange(tokens, device="cuda")[None] < lengths[:, None])[:, None, None, :]

    def run(impl: str, dtype: torch.dtype) -> list[torch.Tensor]:
        query, key, value, grad = (x.to(dtype).detach().requires_grad_() for x in inputs)
        out = attention(query, key, value, mask, impl=impl, scale=64**-0.5)
        return [out, *torch.autograd.grad(out, [query, key, value], grad.detach())]

    # float64 SDPA is the formula, without a kernel of its own
    truth = run("sdpa", torch.float64)
    least = torch.finfo(dtype).eps
    for ours, torchs, right in zip(run("xformers", dtype), run("sdpa", dtype), truth, strict=True):
        scale = right.abs().max()
        error, own = ((x.double() - right).abs().max() / scale for x in (ours, torchs))
        assert error <= 2 * own + least, (float(error), float(own))

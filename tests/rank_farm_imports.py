"""What the forkserver of tests/rank_farm.py imports once: every rank is a fork of it.

Only modules that start no thread may be here. DeepSpeed's first optimiser imports torch's compiler
(4 s of processor time a rank), which nothing here uses.
"""

from __future__ import annotations

import contextlib
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else it starts a pool of processes

import torch
import torch._dynamo
import torch.distributed
import torch.multiprocessing

with contextlib.suppress(ImportError):  # the plain engine needs none
    import deepspeed
    import deepspeed.ops
    import deepspeed.runtime.zero.muon.original_muon
    import deepspeed.runtime.zero.stage3  # noqa: F401

import mlip.objective  # noqa: F401
import tests.training.exact_ranks
import tests.training.toy_run  # noqa: F401

torch.set_num_threads(1)

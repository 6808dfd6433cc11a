"""What the forkserver of tests/rank_farm.py imports once: every rank is a fork of it.

Only modules that start no thread may be here. transformers and deepspeed cost most of it.
"""

from __future__ import annotations

import contextlib
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed
import torch.multiprocessing

with contextlib.suppress(ImportError):  # the plain engine needs none
    import deepspeed
    import deepspeed.ops
    import deepspeed.runtime.zero.stage3  # noqa: F401

import mlip.objective  # noqa: F401
import mlip.training.loop  # noqa: F401

torch.set_num_threads(1)
